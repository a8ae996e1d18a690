"""``scale_shift_``: one program for each token and block of columns.

Each looks through the segments for those of its token: there are at most as many as sequences
with adapters, and they stay in cache. So the grid depends on shapes only. The row is read and
written once, however many of its segments there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.backends import register
from manylora_kernels.gpu import TRITON
from manylora_kernels.gpu.launch import is_ours
from manylora_kernels.reference import lora as reference

_COLUMNS = 1024


@triton.jit(do_not_specialize=["count"])
def _scale_shift(
    y: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    segments: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    y_stride: tl.tensor,
    pool_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    place = y + token.to(tl.int64) * y_stride + column
    before = tl.load(place, mask=inside)
    after = before.to(tl.float32)
    found = 0
    for index in range(count):
        segment = segments + index * 4
        if (tl.load(segment) <= token) & (token < tl.load(segment + 1)):
            pool = tl.load(segment + 2).to(tl.int64) * pool_stride + column
            weight = tl.load(segment + 3).to(tl.float32, bitcast=True)
            factor = tl.load(scale + pool, mask=inside).to(tl.float32)
            offset = tl.load(shift + pool, mask=inside).to(tl.float32)
            after = after * factor + weight * offset
            found = 1
    if found > 0:
        tl.store(place, after.to(before.dtype), mask=inside)


@register("scale_shift_", TRITON)
def scale_shift_triton(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, segments: torch.Tensor
) -> None:
    """See ``ops.scale_shift_``. In float32, rounded once; what is not ours, the reference's."""
    if not is_ours(y, scale, shift):
        reference.scale_shift_(y, scale, shift, segments)
        return
    tokens, width = y.shape
    if not tokens or not segments.shape[0]:
        return
    assert y.stride(1) == scale.stride(1) == shift.stride(1) == 1, "rows must be contiguous"
    assert scale.stride(0) == shift.stride(0)
    _scale_shift[(tokens, triton.cdiv(width, _COLUMNS))](
        y,
        scale,
        shift,
        segments.to(y.device),
        segments.shape[0],
        width,
        y.stride(0),
        scale.stride(0),
        block=_COLUMNS,
        num_warps=4,
    )
