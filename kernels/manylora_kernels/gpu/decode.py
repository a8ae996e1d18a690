"""Attention of one query a sequence, in partitions of its keys. See ``paged``."""

from __future__ import annotations

import triton
import triton.language as tl

from manylora_kernels.gpu.attention_tile import attend_tile


@triton.jit(do_not_specialize=["partitions"])
def decode(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    sinks: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    results: tl.tensor,
    partitions: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    table_stride: tl.tensor,
    k_page: tl.tensor,
    k_token: tl.tensor,
    v_page: tl.tensor,
    v_token: tl.tensor,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    partition: tl.constexpr,
    single: tl.constexpr,
    capped: tl.constexpr,
    has_sinks: tl.constexpr,
    widen: tl.constexpr,
    block_m: tl.constexpr,
    block_j: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """One program for each sequence, key head and partition.

    Writes ``out`` itself where there is a ``single`` partition, else the partition's maximum, sum
    and result ``[sequences, heads, partitions]``, for ``combine``.
    """
    sequence, kv_head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * group
    length = tl.load(context_lens + sequence)
    first = index * partition
    last = tl.minimum(first + partition, length)
    seen = first < last
    if window > 0:
        seen = seen & (last > length - window)
    if single:
        # Even a sequence of no keys gets its row written.
        seen = index == 0
    if seen:
        m, d, e = tl.arange(0, block_m), tl.arange(0, block_k), tl.arange(0, block_v)
        head = kv_head * group + m
        q_tile = tl.load(
            q + sequence.to(tl.int64) * q_token + head[:, None] * q_head + d[None, :],
            mask=(m < group)[:, None] & (d < key_dim)[None, :],
            other=0.0,
        )
        if widen:
            q_tile = q_tile.to(tl.float32)
        positions = tl.where(m < group, length - 1, -1)
        maximum = tl.full((block_m,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((block_m,), dtype=tl.float32)
        result = tl.zeros((block_m, block_v), dtype=tl.float32)
        maximum, total, result = attend_tile(
            q_tile,
            positions,
            k_cache + kv_head * key_dim,
            v_cache + kv_head * value_dim,
            block_tables + sequence.to(tl.int64) * table_stride,
            first,
            last,
            scale,
            window,
            softcap,
            k_page,
            k_token,
            v_page,
            v_token,
            maximum,
            total,
            result,
            key_dim,
            value_dim,
            block_tokens,
            capped,
            widen,
            block_j,
            block_k,
            block_v,
        )
        row = sequence.to(tl.int64) * heads + head
        inside = (m < group)[:, None] & (e < value_dim)[None, :]
        if single:
            # As combine does, of one partition.
            highest = maximum
            if has_sinks:
                sink = tl.load(sinks + head, mask=m < group, other=0.0).to(tl.float32)
                highest = tl.maximum(maximum, sink)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            shrink = tl.exp(maximum - base)
            total = total * shrink
            if has_sinks:
                total += tl.exp(sink - base)
            total = tl.where(total == 0.0, 1.0, total)
            result = result * shrink[:, None] / total[:, None]
            tl.store(
                out + row[:, None] * value_dim + e[None, :],
                result.to(out.dtype.element_ty),
                mask=inside,
            )
        else:
            place = row * partitions + index
            tl.store(maxima + place, maximum, mask=m < group)
            tl.store(totals + place, total, mask=m < group)
            tl.store(results + place[:, None] * value_dim + e[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["partitions"])
def combine(
    out: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    results: tl.tensor,
    context_lens: tl.tensor,
    sinks: tl.tensor,
    partitions: tl.tensor,
    window: tl.tensor,
    value_dim: tl.constexpr,
    partition: tl.constexpr,
    has_sinks: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """One program for each sequence and head: the sum of its partitions, in order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = sequence.to(tl.int64) * tl.num_programs(1) + head
    length = tl.load(context_lens + sequence)
    last = (length + partition - 1) // partition
    first = length * 0
    if window > 0:
        first = tl.maximum(length - window, 0) // partition
    e = tl.arange(0, block_v)
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    for index in range(first, last):
        highest = tl.maximum(highest, tl.load(maxima + row * partitions + index))
    if has_sinks:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((1,), dtype=tl.float32)
    result = tl.zeros((block_v,), dtype=tl.float32)
    for index in range(first, last):
        place = row * partitions + index
        shrink = tl.exp(tl.load(maxima + place) - base)
        total += tl.load(totals + place) * shrink
        part = tl.load(results + place * value_dim + e, mask=e < value_dim, other=0.0)
        result += part * shrink
    if has_sinks:
        total += tl.exp(sink - base)
    total = tl.where(total == 0.0, 1.0, total)
    result = (result / total).to(out.dtype.element_ty)
    tl.store(out + row * value_dim + e, result, mask=e < value_dim)
