"""Dense layers on a CPU whose weight stays in the 16 bits that its checkpoint has."""

from __future__ import annotations

import torch
from torch import nn

from manylora_kernels import (
    HalfWeight,
    half_embedding,
    half_linear,
    halve,
    native,
    selected_backend,
)
from manylora_kernels.native.binding import ISAS

PORTABLE = ISAS[0]


class HalfModule(nn.Module):
    """Holds ``W`` in bfloat16 or float16, tiled; all else is float32.

    Not a parameter: nothing writes to it, and what copies parameters leaves it where it is.
    """

    bias: torch.Tensor | None
    weight_half: HalfWeight

    def __init__(self, weight: HalfWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_half = weight
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """A tensor without storage, of the shape, device and dtype that ``W`` is computed as.

        Callers in transformers convert their activations to its dtype, which must not narrow them.
        """
        return torch.zeros((), device=self.weight_half.tiles.device).expand(self.weight_half.shape)

    def dense_weight(self) -> torch.Tensor:
        """Return ``W`` in float32."""
        return self.weight_half.widen()


class HalfLinear(HalfModule):
    """``y = W x + bias`` with ``W [out, in]``.

    The numbers are those of the widened weight, up to the order of summation.
    """

    def __init__(self, weight: HalfWeight, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        y = half_linear(x.reshape(-1, self.in_features), self.weight_half, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class HalfEmbedding(HalfModule):
    """``y = W[x]`` with ``W [vocab, width]``, for embeddings that share it with the output head."""

    def __init__(self, weight: HalfWeight) -> None:
        super().__init__(weight, None)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., width]`` for token numbers ``x``."""
        return half_embedding(x.reshape(-1), self.weight_half).view(*x.shape, self.embedding_dim)


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
