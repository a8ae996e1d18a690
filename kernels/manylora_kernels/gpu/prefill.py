"""Attention of chunks of several queries. See ``paged``."""

from __future__ import annotations

import triton
import triton.language as tl

from manylora_kernels.gpu.attention_tile import attend_tile


@triton.jit(do_not_specialize=["sequences", "first_sequence"])
def prefill(
    out: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_starts: tl.tensor,
    sinks: tl.tensor,
    first_sequence: tl.tensor,
    sequences: tl.tensor,
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
    queries: tl.constexpr,
    capped: tl.constexpr,
    has_sinks: tl.constexpr,
    widen: tl.constexpr,
    block_m: tl.constexpr,
    block_j: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    """One program for each tile of ``queries`` tokens of one sequence, and key head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1) * group
    # Sequence s has tiles from (start of s) // queries + s on, never fewer than it needs.
    base = tl.load(query_starts + first_sequence)
    low, high = first_sequence, sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        place = (tl.load(query_starts + middle) - base) // queries + middle - first_sequence
        if place <= tile:
            low = middle
        else:
            high = middle - 1
    start, end = tl.load(query_starts + low), tl.load(query_starts + low + 1)
    before = (start - base) // queries + low - first_sequence
    first_query = start + (tile - before) * queries
    if first_query < end:
        m, d, e = tl.arange(0, block_m), tl.arange(0, block_k), tl.arange(0, block_v)
        query, head = first_query + m // group, kv_head * group + m % group
        own = (m < queries * group) & (query < end)
        length = tl.load(context_lens + low)
        positions = tl.where(own, length - end + query, -1)
        last = length - end + tl.minimum(first_query + queries, end)
        q_tile = tl.load(
            q + query.to(tl.int64)[:, None] * q_token + head[:, None] * q_head + d[None, :],
            mask=own[:, None] & (d < key_dim)[None, :],
            other=0.0,
        )
        if widen:
            q_tile = q_tile.to(tl.float32)
        maximum = tl.full((block_m,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((block_m,), dtype=tl.float32)
        if has_sinks:
            # A sink is a key without a value that every row sees first.
            maximum = tl.load(sinks + head, mask=own, other=0.0).to(tl.float32)
            total += 1.0
        result = tl.zeros((block_m, block_v), dtype=tl.float32)
        maximum, total, result = attend_tile(
            q_tile,
            positions,
            k_cache + kv_head * key_dim,
            v_cache + kv_head * value_dim,
            block_tables + low.to(tl.int64) * table_stride,
            0,
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
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        row = query.to(tl.int64) * heads + head
        tl.store(
            out + row[:, None] * value_dim + e[None, :],
            result.to(out.dtype.element_ty),
            mask=own[:, None] & (e < value_dim)[None, :],
        )
