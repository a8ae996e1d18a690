"""``paged_attention``: online softmax over pages; all query heads of a key head share its loads.

Rows of a tile are (query, head of the group) pairs, so grouped queries need no copies of keys. Keys
are read through the block table, masked by the sequence's own context, window and causality before
the load: what stale pages hold is never read.

- Decode: one program for each sequence, key head and partition of ``PARTITION`` keys at fixed
  positions, and a second launch that adds a sequence's partitions in order, where there can be
  more than one. The grid depends on the width of ``block_tables``; partitions outside of a context
  end at once.
- Prefill: one program for each tile of queries and key head. A tile finds its sequence by itself,
  so the grid depends on shapes only; it walks through keys in steps at fixed positions.

A query's sum depends on its own position and on which of the two computes it (a chunk of one token
is a decode), not on the batch. Reference: FlashAttention-2 (arXiv:2307.08691), Flash-Decoding,
PagedAttention (arXiv:2309.06180).
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from manylora_kernels.backends import register
from manylora_kernels.gpu import TRITON
from manylora_kernels.gpu.decode import combine, decode
from manylora_kernels.gpu.launch import dots_in_float32, is_ours, rows_contiguous
from manylora_kernels.gpu.prefill import prefill
from manylora_kernels.reference import attention as reference

PARTITION = 256
_TILE_ROWS = 64


@register("paged_attention", TRITON)
def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.paged_attention`` and the module docstring. Scores and sums are float32.

    A sequence of context 0 is padding: its row is 0. What is not ours, the reference computes.
    """
    if not is_ours(q, k_cache, v_cache):
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            context_lens,
            query_starts,
            num_decodes,
            scale,
            window,
            softcap,
            sinks,
        )
    tokens, heads, key_dim = q.shape
    block_tokens, kv_heads, value_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    sequences, group = context_lens.shape[0], heads // kv_heads
    q = rows_contiguous(q)
    out = torch.empty((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    strides = (
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
    )
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    wide = max(block_k, block_v) > 128 or q.element_size() == 4
    shared: dict[str, Any] = {
        "group": group,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "block_tokens": block_tokens,
        "capped": softcap != 0.0,
        "has_sinks": sinks is not None,
        "widen": dots_in_float32(q),
        "block_j": 32 if wide else 64,
        "block_k": block_k,
        "block_v": block_v,
        "num_stages": 2,
    }
    given_sinks = q if sinks is None else sinks
    if num_decodes:
        partitions = max(1, triton.cdiv(block_tables.shape[1] * block_tokens, PARTITION))
        single = partitions == 1
        rows = num_decodes * heads * partitions
        sizes = (1, 1, 1) if single else (rows, rows, rows * value_dim)
        scratch = [torch.empty(n, dtype=torch.float32, device=q.device) for n in sizes]
        decode[(num_decodes, kv_heads, partitions)](
            out,
            q,
            k_cache,
            v_cache,
            block_tables,
            context_lens,
            given_sinks,
            *scratch,
            partitions,
            scale,
            window,
            softcap,
            *strides,
            partition=PARTITION,
            single=single,
            block_m=max(16, triton.next_power_of_2(group)),
            num_warps=4,
            **shared,
        )
        if not single:
            combine[(num_decodes, heads)](
                out,
                *scratch,
                context_lens,
                given_sinks,
                partitions,
                window,
                value_dim=value_dim,
                partition=PARTITION,
                has_sinks=sinks is not None,
                block_v=block_v,
                num_warps=1,
            )
    prefills = sequences - num_decodes
    if prefills:
        block_m = max(_TILE_ROWS, triton.next_power_of_2(group))
        queries = block_m // group
        tiles = (tokens - num_decodes) // queries + prefills
        prefill[(tiles, kv_heads)](
            out,
            q,
            k_cache,
            v_cache,
            block_tables,
            context_lens,
            query_starts,
            given_sinks,
            num_decodes,
            sequences,
            scale,
            window,
            softcap,
            *strides,
            queries=queries,
            block_m=block_m,
            num_warps=8 if wide else 4,
            **shared,
        )
    return out
