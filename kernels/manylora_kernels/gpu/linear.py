"""``nf4_linear``: 4-bit weights unpacked in registers, multiplied by the matrix units.

``W`` is the left operand, so that it goes from registers to the matrix units however few the tokens
are. The sum over ``in`` is cut into parts (``launch.splits_of``, by the weight's shape alone)::

    y[t, n] = ((p_0 + p_1) + ...) + bias[n],    p_i = sum over part i of W[n, k] x[t, k]

``W`` is rounded to ``x``'s dtype, sums are float32. Few tokens: one program for each block of rows
and part; the last to arrive at a block adds the parts in order (``_linear``, ``split``). Many: one
program for each block of rows and of tokens goes through the parts one after the other. Both walk
through a part in the same steps, so a token's sum has one order whatever the batch.

References: QLoRA (arXiv:2305.14314) for the format; split sums by the last arriver as in Stream-K
(arXiv:2301.03598).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from manylora_kernels.backends import register
from manylora_kernels.gpu import TRITON
from manylora_kernels.gpu.launch import (
    INTERPRETED,
    dots_in_float32,
    is_ours,
    rows_contiguous,
    splits_of,
)
from manylora_kernels.nf4 import Form
from manylora_kernels.reference import linear as reference

# Up to this many tokens a program reads its weights for all of them.
SPLIT_TOKENS = 64
_COLUMNS = 128
_SPLIT_ROWS = 64
# What a small matrix is cut up for: a few programs on every multiprocessor.
_PROGRAMS = 512
_MOST_PARTS = 8
_LEAST_COLUMNS = 512
_COUNTERS = 65536


@triton.jit
def _maxima(
    absmax: tl.tensor,
    absmax_code: tl.tensor,
    absmax_scale: tl.tensor,
    absmax_offset: tl.tensor,
    blocks: tl.tensor,
    inside: tl.tensor,
    group: tl.constexpr,
    nested: tl.constexpr,
) -> tl.tensor:
    """Return ``NF4Weight``'s ``absmax[blocks]``, 0 where not ``inside``."""
    stored = tl.load(absmax + blocks, mask=inside, other=0)
    if nested:
        scale = tl.load(absmax_scale + blocks // group, mask=inside, other=0.0)
        value = tl.load(absmax_code + stored.to(tl.int32)) * scale + absmax_offset
        maxima = tl.where(inside, value, 0.0)
    else:
        maxima = stored
    return maxima


@triton.jit
def _unpack(
    packed: tl.tensor,
    code: tl.tensor,
    absmax: tl.tensor,
    absmax_code: tl.tensor,
    absmax_scale: tl.tensor,
    absmax_offset: tl.tensor,
    n: tl.tensor,
    n_inside: tl.tensor,
    column: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    block_size: tl.constexpr,
    group: tl.constexpr,
    nested: tl.constexpr,
    segment: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> tl.tensor:
    """Return float32 ``W[n, column : column + block_k]``, 0 outside of ``W``.

    ``segment``: how many columns share a block maximum where rows are whole blocks; 0 where blocks
    straddle rows, and every weight's place is worked out by itself.
    """
    if segment:
        g = column + tl.arange(0, block_k // segment) * segment
        byte = tl.arange(0, segment // 2)
        inside = n_inside[:, None] & (g < in_features)[None, :]
        first = n.to(tl.int64)[:, None] * row_bytes + (g // 2)[None, :]
        pair = tl.load(
            packed + first[:, :, None] + byte[None, None, :], mask=inside[:, :, None], other=0
        ).to(tl.int32)
        blocks = n.to(tl.int64)[:, None] * (in_features // block_size) + (g // block_size)[None, :]
        scale = _maxima(
            absmax, absmax_code, absmax_scale, absmax_offset, blocks, inside, group, nested
        )[:, :, None]
        high = tl.zeros((block_n, block_k // segment, segment // 2), dtype=tl.float32)
        low = high
        # Always so, which the compiler cannot know: within a branch these lookups are loads from
        # cache, outside of it each would be copied through shared memory ahead of its use.
        if column < in_features:
            high = tl.load(code + (pair >> 4)) * scale
            low = tl.load(code + (pair & 15)) * scale
        weight = tl.reshape(tl.join(high, low), (block_n, block_k))
    else:
        k = column + tl.arange(0, block_k)
        inside = n_inside[:, None] & (k < in_features)[None, :]
        place = n.to(tl.int64)[:, None] * in_features + k[None, :]
        pair = tl.load(packed + place // 2, mask=inside, other=0).to(tl.int32)
        index = tl.where(place % 2 == 0, pair >> 4, pair & 15)
        scale = _maxima(
            absmax,
            absmax_code,
            absmax_scale,
            absmax_offset,
            place // block_size,
            inside,
            group,
            nested,
        )
        weight = tl.load(code + index) * scale
    return weight


@triton.jit
def _write(
    y: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    n: tl.tensor,
    n_inside: tl.tensor,
    t: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    has_bias: tl.constexpr,
) -> None:
    if has_bias:
        total += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    place = y + t.to(tl.int64)[None, :] * out_features + n[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=n_inside[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    y: tl.tensor,
    x: tl.tensor,
    packed: tl.tensor,
    code: tl.tensor,
    absmax: tl.tensor,
    absmax_code: tl.tensor,
    absmax_scale: tl.tensor,
    absmax_offset: tl.tensor,
    bias: tl.tensor,
    scratch: tl.tensor,
    counters: tl.tensor,
    tokens: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    x_stride: tl.tensor,
    part_columns: tl.tensor,
    parts: tl.constexpr,
    split: tl.constexpr,
    block_size: tl.constexpr,
    group: tl.constexpr,
    nested: tl.constexpr,
    segment: tl.constexpr,
    has_bias: tl.constexpr,
    widen: tl.constexpr,
    block_n: tl.constexpr,
    block_t: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    n = block * block_n + tl.arange(0, block_n)
    n_inside = n < out_features
    if split:
        first = tl.program_id(1)
        last = first + 1
        t = tl.arange(0, block_t)
    else:
        first = 0
        last = parts
        t = tl.program_id(1) * block_t + tl.arange(0, block_t)
    k = tl.arange(0, block_k)
    x_rows = x + t.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((block_n, block_t), dtype=tl.float32)
    for part in range(first, last):
        start = part * part_columns
        partial = tl.zeros((block_n, block_t), dtype=tl.float32)
        for column in range(start, tl.minimum(start + part_columns, in_features), block_k):
            weight = _unpack(
                packed,
                code,
                absmax,
                absmax_code,
                absmax_scale,
                absmax_offset,
                n,
                n_inside,
                column,
                in_features,
                row_bytes,
                block_size,
                group,
                nested,
                segment,
                block_n,
                block_k,
            )
            x_tile = tl.load(
                x_rows + (column + k)[:, None],
                mask=(column + k < in_features)[:, None] & (t < tokens)[None, :],
                other=0.0,
            )
            weight = weight.to(x_tile.dtype)
            if widen:
                weight, x_tile = weight.to(tl.float32), x_tile.to(tl.float32)
            partial = tl.dot(weight, x_tile, partial, input_precision="ieee")
        total += partial
    if split and parts > 1:
        tile = tl.arange(0, block_n)[:, None] * block_t + t[None, :]
        place = scratch + block.to(tl.int64) * parts * block_n * block_t + tile
        tl.store(place + first * (block_n * block_t), total)
        # All of this program's stores are done before any thread says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1, sem="acq_rel") == parts - 1:
            total = tl.zeros((block_n, block_t), dtype=tl.float32)
            for part in range(parts):
                # Past the first-level cache: other multiprocessors wrote it.
                total += tl.load(place + part * (block_n * block_t), cache_modifier=".cg")
            # For the next call on this stream.
            tl.store(counters + block, 0)
            _write(y, bias, total, n, n_inside, t, tokens, out_features, has_bias)
    else:
        _write(y, bias, total, n, n_inside, t, tokens, out_features, has_bias)


@register("nf4_linear", TRITON)
def nf4_linear_triton(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.nf4_linear`` and the module docstring. Any shape and block size, NF4 and FP4.

    Weights tiled for CPUs, and what is not ours, are computed by the reference.
    """
    whole = Form(*form)
    packed, code, absmax, *nested = weight
    known = absmax.dtype is (torch.uint8 if nested else torch.float32)
    if whole.tiled or not known or not is_ours(x) or (not INTERPRETED and not packed.is_cuda):
        return reference.nf4_linear(x, weight, form, absmax_offset, bias)
    tokens, in_features = x.shape
    out_features = whole.out_features
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if not tokens:
        return y
    x = rows_contiguous(x)
    split = tokens <= SPLIT_TOKENS
    parts, part_columns = _parts(out_features, in_features)
    if split:
        block_n, block_t = _SPLIT_ROWS, max(16, triton.next_power_of_2(tokens))
    else:
        # More tokens at once need the registers and the shared memory of 9.0.
        block_n, block_t = 128, 128 if x.element_size() == 2 and _is_large(x.device) else 64
    segment = _segment(in_features, whole.block_size)
    grid = (triton.cdiv(out_features, block_n), parts if split else triton.cdiv(tokens, block_t))
    combines = split and parts > 1
    scratch = y
    if combines:
        assert grid[0] <= _COUNTERS, "more rows than counters"
        size = grid[0] * parts * block_n * block_t
        scratch = torch.empty(size, dtype=torch.float32, device=x.device)
    _linear[grid](
        y,
        x,
        packed,
        code,
        absmax,
        nested[0] if nested else code,
        nested[1] if nested else code,
        absmax_offset,
        code if bias is None else bias,
        scratch,
        _counters(x.device, _stream(x.device)) if combines else packed,
        tokens,
        out_features,
        in_features,
        in_features // 2,
        x.stride(0),
        part_columns,
        parts=parts,
        split=split,
        block_size=whole.block_size,
        group=whole.absmax_block_size,
        nested=bool(nested),
        segment=segment,
        has_bias=bias is not None,
        widen=dots_in_float32(x),
        block_n=block_n,
        block_t=block_t,
        block_k=_COLUMNS,
        num_warps=4 if split else 8,
        num_stages=_stages(x.device, block_t * x.element_size()) if segment else 1,
    )
    return y


def _parts(out_features: int, in_features: int) -> tuple[int, int]:
    """Return how many parts the sum over ``in`` has, and the columns of one."""
    wanted = -(-_PROGRAMS // -(-out_features // _SPLIT_ROWS))
    most = min(_MOST_PARTS, wanted, -(-in_features // _LEAST_COLUMNS))
    return splits_of(in_features, _COLUMNS, most)


def _segment(in_features: int, block_size: int) -> int:
    """Return ``_unpack``'s ``segment``."""
    power = block_size & (block_size - 1) == 0 and block_size >= 32
    return min(block_size, _COLUMNS) if power and in_features % block_size == 0 else 0


def _stages(device: torch.device, row_bytes: int) -> int:
    """Return how many steps of the loop to load ahead, by the shared memory there is."""
    if device.type != "cuda":
        return 1
    shared = _shared_memory(device)
    # The unpacked tile is in shared memory once, x's tile and the bytes once for each step ahead.
    unpacked = 128 * _COLUMNS * 4
    return max(1, min(4, (shared - unpacked) // (row_bytes * _COLUMNS + 8192)))


def _is_large(device: torch.device) -> bool:
    return device.type == "cuda" and _shared_memory(device) >= 200 * 1024


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    """Return the counters of one stream's calls, zero between any two of them."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
