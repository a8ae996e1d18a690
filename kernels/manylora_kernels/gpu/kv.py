"""``store_kv_``: one program for each token and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora_kernels.backends import register
from manylora_kernels.gpu import TRITON
from manylora_kernels.gpu.launch import is_ours, rows_contiguous
from manylora_kernels.reference import attention as reference


@triton.jit
def _store(
    k: tl.tensor,
    v: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    positions: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.num_programs(1)
    position = tl.load(positions + token)
    if position >= 0:
        place = position * heads + head
        i, j = tl.arange(0, block_k), tl.arange(0, block_v)
        key = tl.load(k + token * k_token + head * k_head + i, mask=i < key_dim)
        tl.store(k_cache + place * key_dim + i, key, mask=i < key_dim)
        value = tl.load(v + token * v_token + head * v_head + j, mask=j < value_dim)
        tl.store(v_cache + place * value_dim + j, value, mask=j < value_dim)


@register("store_kv_", TRITON)
def store_kv_triton(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See ``ops.store_kv_``. Negative positions are padding; what is not ours, the reference's."""
    if not is_ours(k_cache, v_cache, k, v):
        reference.store_kv_(k_cache, v_cache, k, v, positions)
        return
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    k, v = rows_contiguous(k), rows_contiguous(v)
    tokens, heads, key_dim = k.shape
    if not tokens:
        return
    _store[(tokens, heads)](
        k,
        v,
        k_cache,
        v_cache,
        positions,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        key_dim,
        v.shape[2],
        block_k=triton.next_power_of_2(key_dim),
        block_v=triton.next_power_of_2(v.shape[2]),
        num_warps=1,
    )
