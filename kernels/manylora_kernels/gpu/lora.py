"""``lora_delta_``: segmented shrink and expand over the tables of ``tile_plan``, two launches.

Shrink: one program for each item and part of ``in``; sums of the parts go to a float32 scratch.
Expand: one program for each cell and block of ``out``; it adds the parts in order, then the items
in order, then the row of ``y``, which is read and written once. Nothing is added atomically.
Tokens of the base, and ranks that an adapter does not have, cost nothing.

References: Punica's SGMV (arXiv:2310.18547), S-LoRA's MBGMM (arXiv:2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from manylora_kernels.backends import register
from manylora_kernels.gpu import TRITON
from manylora_kernels.gpu.launch import dots_in_float32, is_ours, rows_contiguous, splits_of
from manylora_kernels.reference import lora as reference
from manylora_kernels.tile_plan import CELL_TOKENS, COLUMNS, ITEM_RANKS

_SHRINK_COLUMNS = 128
# At most: with more, expanding many tokens would read more scratch than pools.
_MOST_PARTS = 8
_LEAST_CHUNKS = 4
_EXPAND_COLUMNS = 128


# Numbers that change from step to step are not specialized: no step may wait for a compiler.
@triton.jit(do_not_specialize=["count_items"])
def _shrink(
    x: tl.tensor,
    a: tl.tensor,
    items: tl.tensor,
    scratch: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    a_stride: tl.tensor,
    count_items: tl.tensor,
    part_columns: tl.tensor,
    table_columns: tl.constexpr,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_k: tl.constexpr,
    widen: tl.constexpr,
) -> None:
    index, part = tl.program_id(0), tl.program_id(1)
    item = items + index * table_columns
    count = tl.load(item + 1)
    if count > 0:
        token, row = tl.load(item).to(tl.int64), tl.load(item + 2).to(tl.int64)
        rank = tl.load(item + 3)
        t, r, k = tl.arange(0, block_t), tl.arange(0, block_r), tl.arange(0, block_k)
        x_rows = x + (token + t)[:, None] * x_stride
        a_rows = a + (row + r)[None, :] * a_stride
        total = tl.zeros((block_t, block_r), dtype=tl.float32)
        start = part * part_columns
        for column in range(start, tl.minimum(start + part_columns, in_features), block_k):
            inside = column + k < in_features
            x_tile = tl.load(
                x_rows + (column + k)[None, :],
                mask=(t < count)[:, None] & inside[None, :],
                other=0.0,
            )
            a_tile = tl.load(
                a_rows + (column + k)[:, None],
                mask=inside[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            if widen:
                x_tile, a_tile = x_tile.to(tl.float32), a_tile.to(tl.float32)
            total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
        place = (part * count_items + index).to(tl.int64) * (block_t * block_r)
        tl.store(
            scratch + place + t[:, None] * block_r + r[None, :],
            total,
            mask=(t < count)[:, None] & (r < rank)[None, :],
        )


@triton.jit(do_not_specialize=["count_items"])
def _expand(
    y: tl.tensor,
    b: tl.tensor,
    items: tl.tensor,
    cells: tl.tensor,
    scratch: tl.tensor,
    out_features: tl.tensor,
    y_stride: tl.tensor,
    b_stride: tl.tensor,
    count_items: tl.tensor,
    parts: tl.tensor,
    table_columns: tl.constexpr,
    block_t: tl.constexpr,
    block_r: tl.constexpr,
    block_n: tl.constexpr,
    widen: tl.constexpr,
) -> None:
    cell = cells + tl.program_id(0) * table_columns
    count = tl.load(cell + 1)
    if count > 0:
        token = tl.load(cell).to(tl.int64)
        first, last = tl.load(cell + 2), tl.load(cell + 2) + tl.load(cell + 3)
        t, r = tl.arange(0, block_t), tl.arange(0, block_r)
        n = tl.program_id(1) * block_n + tl.arange(0, block_n)
        total = tl.zeros((block_t, block_n), dtype=tl.float32)
        for index in range(first, last):
            item = items + index * table_columns
            row, rank = tl.load(item + 2).to(tl.int64), tl.load(item + 3)
            weight = tl.load(item + 4).to(tl.float32, bitcast=True)
            own = (t < count)[:, None] & (r < rank)[None, :]
            projected = tl.zeros((block_t, block_r), dtype=tl.float32)
            for part in range(parts):
                place = (part * count_items + index).to(tl.int64) * (block_t * block_r)
                projected += tl.load(
                    scratch + place + t[:, None] * block_r + r[None, :], mask=own, other=0.0
                )
            b_tile = tl.load(
                b + (row + r)[:, None] * b_stride + n[None, :],
                mask=(r < rank)[:, None] & (n < out_features)[None, :],
                other=0.0,
            )
            projected = (projected * weight).to(b_tile.dtype)
            if widen:
                projected, b_tile = projected.to(tl.float32), b_tile.to(tl.float32)
            total = tl.dot(projected, b_tile, total, input_precision="ieee")
        place = y + (token + t)[:, None] * y_stride + n[None, :]
        inside = (t < count)[:, None] & (n < out_features)[None, :]
        before = tl.load(place, mask=inside, other=0.0)
        tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@register("lora_delta_", TRITON)
def lora_delta_triton(
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
    plan: Sequence[torch.Tensor] | None = None,
) -> None:
    """See ``ops.lora_delta_``. Products of the dtype's values, summed in float32.

    The projection, times its weight, is rounded to the dtype once before it is expanded.
    ``plan``: the tables of ``tile_plan.TilePlan``; without them, and for what is not ours, the
    reference computes.
    """
    if plan is None or not is_ours(y, x, a, b):
        reference.lora_delta_(y, x, a, b, segments, weights, tokens, valid, rows, scales, step)
        return
    items, cells = plan
    count_items, count_cells = items.shape[0], cells.shape[0]
    if not count_items:
        return
    assert y.stride(1) == a.stride(1) == b.stride(1) == 1, "rows must be contiguous"
    x = rows_contiguous(x)
    in_features, out_features = x.shape[1], y.shape[1]
    chunks = -(-in_features // _SHRINK_COLUMNS)
    parts, part_columns = splits_of(
        in_features, _SHRINK_COLUMNS, min(_MOST_PARTS, -(-chunks // _LEAST_CHUNKS))
    )
    scratch = torch.empty(
        parts * count_items * CELL_TOKENS * ITEM_RANKS, dtype=torch.float32, device=y.device
    )
    widen = dots_in_float32(x)
    _shrink[(count_items, parts)](
        x,
        a,
        items,
        scratch,
        in_features,
        x.stride(0),
        a.stride(0),
        count_items,
        part_columns,
        table_columns=COLUMNS,
        block_t=CELL_TOKENS,
        block_r=ITEM_RANKS,
        block_k=_SHRINK_COLUMNS,
        widen=widen,
        num_warps=2,
        num_stages=4,
    )
    _expand[(count_cells, triton.cdiv(out_features, _EXPAND_COLUMNS))](
        y,
        b,
        items,
        cells,
        scratch,
        out_features,
        y.stride(0),
        b.stride(0),
        count_items,
        parts,
        table_columns=COLUMNS,
        block_t=CELL_TOKENS,
        block_r=ITEM_RANKS,
        block_n=_EXPAND_COLUMNS,
        widen=widen,
        num_warps=4,
        num_stages=2,
    )
