"""A linear layer whose weight takes one byte, with a scale for every row."""

from __future__ import annotations

import torch
from torch import nn

from manylora_kernels import Int8Weight, int8_linear


class Int8Linear(nn.Module):
    """``y = W x + bias`` with ``W [out, in]`` in eight bits; activations are not rounded."""

    bias: torch.Tensor | None

    def __init__(
        self, weight: Int8Weight, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight_int8 = weight
        self.out_features, self.in_features = weight.shape
        self._dtype = dtype
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """A tensor without storage, of the shape, device and dtype that ``W`` is computed as."""
        blank = torch.zeros((), dtype=self._dtype, device=self.weight_int8.tiles.device)
        return blank.expand(self.weight_int8.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        y = int8_linear(x.reshape(-1, self.in_features), self.weight_int8, self.bias)
        return y.view(*x.shape[:-1], self.out_features)
