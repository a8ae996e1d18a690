"""Linear layers and embeddings with half-width weights in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from manylora_kernels.backends import REFERENCE, register
from manylora_kernels.half import rows, widen


@register("half_linear", REFERENCE)
def half_linear(
    x: torch.Tensor, tiles: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """See ``ops.half_linear``: materialises ``W`` and multiplies."""
    return F.linear(x, widen(tiles, out_features, x.shape[1], x.dtype), bias)


@register("half_embedding", REFERENCE)
def half_embedding(index: torch.Tensor, tiles: torch.Tensor, columns: int) -> torch.Tensor:
    """See ``ops.half_embedding``."""
    return rows(tiles, columns, index)
