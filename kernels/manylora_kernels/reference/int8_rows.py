"""Linear layers with eight-bit weights in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from manylora_kernels.backends import REFERENCE, register
from manylora_kernels.int8_rows import widen


@register("int8_linear", REFERENCE)
def int8_linear(
    x: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See ``ops.int8_linear``: materialises ``W`` and multiplies."""
    return F.linear(x, widen(tiles, scale, x.shape[1]).to(x.dtype), bias)
