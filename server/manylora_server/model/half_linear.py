"""Dense linear layers on a CPU whose weight stays in the 16 bits that its checkpoint has."""

from __future__ import annotations

import torch
from torch import nn

from manylora_kernels import HalfWeight, half_linear, halve, native, selected_backend
from manylora_kernels.native.binding import ISAS

PORTABLE = ISAS[0]


class HalfLinear(nn.Module):
    """``y = W x + bias`` with ``W [out, in]`` in bfloat16 or float16; all else is float32.

    The numbers are those of the widened weight, up to the order of summation.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: HalfWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_half = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """A tensor without storage, of the shape, device and dtype that ``W`` is computed as.

        Callers in transformers convert their activations to its dtype, which must not narrow them.
        """
        return torch.zeros((), device=self.weight_half.tiles.device).expand(self.weight_half.shape)

    def dense_weight(self) -> torch.Tensor:
        """Return ``W [out, in]`` in float32."""
        return self.weight_half.widen()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        y = half_linear(x.reshape(-1, self.in_features), self.weight_half, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def halved(weight: torch.Tensor, bias: torch.Tensor | None) -> HalfLinear | None:
    """Return a layer with ``weight`` in half of its bytes.

    ``None`` where that would lose something, or where no kernel widens in registers. The portable
    kernels are no match for a BLAS with many tokens.
    """
    if selected_backend("half_linear") != native.NATIVE or weight.device.type != "cpu":
        return None
    if native.library.isa == PORTABLE:
        return None
    half = halve(weight)
    return None if half is None else HalfLinear(half, bias)
