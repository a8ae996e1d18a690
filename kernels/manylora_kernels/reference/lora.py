"""Segmented low-rank products and per-token affine maps in plain PyTorch."""

from __future__ import annotations

import torch

from manylora_kernels.backends import REFERENCE, register


@register("lora_delta_", REFERENCE)
def lora_delta_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor | None,
    valid: torch.Tensor | None,
    rows: torch.Tensor | None,
    scales: torch.Tensor | None,
    step: int,
) -> None:
    """See ``ops.lora_delta_``. The grouped form takes two batched products for all segments."""
    if tokens is None or rows is None or scales is None:
        for (start, end, row_start, row_end), weight in zip(
            segments.tolist(), weights.tolist(), strict=True
        ):
            projected = x[start:end] @ a[row_start:row_end].to(x.dtype).t()
            y[start:end].addmm_(projected, b[row_start:row_end].to(x.dtype), alpha=weight)
        return
    count, rank = scales.shape[0], scales.shape[2]
    start, first_row = int(segments[0, 0]), int(segments[0, 2])
    length = tokens.shape[0] // count
    if valid is None:
        inputs = x[start : start + count * length].view(count, length, -1)
    else:
        inputs = x.index_select(0, tokens).view(count, length, -1)
    down = _factors(a, rows, first_row, count, rank, step).to(x.dtype)
    projected = torch.bmm(inputs, down.transpose(1, 2))
    projected.mul_(scales)
    factors = _factors(b, rows, first_row, count, rank, step).to(x.dtype)
    if valid is None:
        y[start : start + count * length].view(count, length, -1).baddbmm_(projected, factors)
    else:
        delta = torch.bmm(projected, factors).view(count * length, -1)
        y.index_add_(0, tokens[valid], delta[valid])


def _factors(
    pool: torch.Tensor, rows: torch.Tensor, first_row: int, count: int, rank: int, step: int
) -> torch.Tensor:
    """Return each segment's rank rows as ``[count, rank, width]``: a view where they are even."""
    if step:
        width = pool.stride(0)
        offset = pool.storage_offset() + first_row * width
        return pool.as_strided((count, rank, pool.shape[1]), (step * width, width, 1), offset)
    return pool.index_select(0, rows).view(count, rank, -1)


@register("scale_shift_", REFERENCE)
def scale_shift_(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, segments: torch.Tensor
) -> None:
    """See ``ops.scale_shift_``."""
    weights = segments[:, 3].contiguous().view(torch.float32).tolist()
    for (start, end, row, _), weight in zip(segments.tolist(), weights, strict=True):
        offset = shift[row] if weight == 1.0 else shift[row] * weight
        torch.addcmul(offset, y[start:end], scale[row], out=y[start:end])
