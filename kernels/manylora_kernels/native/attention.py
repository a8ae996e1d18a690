"""``paged_attention`` and ``store_kv_`` by the native library."""

from __future__ import annotations

import ctypes

import torch

from manylora_kernels.backends import register
from manylora_kernels.native.binding import load
from manylora_kernels.reference import attention as reference


class AttentionJob(ctypes.Structure):
    """``AttentionJob`` of src/attention.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "q",
                "k_cache",
                "v_cache",
                "block_tables",
                "context_lens",
                "query_starts",
                "sinks",
                "out",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "q_token_stride",
                "q_head_stride",
                "queries",
                "sequences",
                "table_width",
                "heads",
                "kv_heads",
                "key_dim",
                "value_dim",
                "blocks",
                "block_tokens",
                "window",
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class StoreJob(ctypes.Structure):
    """``StoreJob`` of src/attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_cache", "v_cache", "positions")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "k_token_stride",
                "k_head_stride",
                "v_token_stride",
                "v_head_stride",
                "tokens",
                "kv_heads",
                "key_dim",
                "value_dim",
                "places",
                "item_bytes",
            )
        ),
    )


_library = load()
_paged_attention = _library.function(
    "manylora_paged_attention", ctypes.POINTER(AttentionJob), ctypes.c_int, ctypes.c_int
)
_store_kv = _library.function("manylora_store_kv", ctypes.POINTER(StoreJob), ctypes.c_int)
# As in src/attention.h.
_NO_MEMORY = 2


@register("store_kv_", "native")
def store_kv_native(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See ``ops.store_kv_``. Copies bits, of any dtype that all four tensors share.

    Other tensors, or ones on another device, are left to the reference.
    """
    if (
        not k_cache.dtype == v_cache.dtype == k.dtype == v.dtype
        or positions.dtype is not torch.int64
        or not (positions.is_cpu and positions.is_contiguous())
        or not (k_cache.is_cpu and k_cache.is_contiguous() and v_cache.is_contiguous())
    ):
        return reference.store_kv_(k_cache, v_cache, k, v, positions)
    k, v = _dense_rows(k), _dense_rows(v)
    blocks, block_tokens, heads, key_dim = k_cache.shape
    tokens = k.shape[0]
    job = StoreJob(
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        positions.data_ptr(),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        tokens,
        heads,
        key_dim,
        v_cache.shape[3],
        blocks * block_tokens,
        k_cache.element_size(),
    )
    if _store_kv(job, _library.threads):
        raise IndexError("store_kv_: a position lies outside of the cache")
    return None


@register("paged_attention", "native")
def paged_attention_native(
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
    """See ``ops.paged_attention``. A query's bits depend on nothing but its own sequence up to it.

    Not on the batch, nor on how the prompt was cut up, nor on threads. Softmax over tiles of keys
    with a running maximum (Milakov and Gimelshein 2018, Dao et al. 2022), all in float32. Other
    dtypes, or tensors on another device, are left to the reference.
    """
    indices = (block_tables, context_lens, query_starts)
    if not (q.dtype == k_cache.dtype == v_cache.dtype == torch.float32) or not (
        q.is_cpu
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and all(index.dtype is torch.int32 and index.is_contiguous() for index in indices)
    ):
        return reference.paged_attention(
            q,
            k_cache,
            v_cache,
            *indices,
            num_decodes,
            scale,
            window,
            softcap,
            sinks,
        )
    q = _dense_rows(q)
    queries, heads, key_dim = q.shape
    blocks, block_tokens, kv_heads, value_dim = v_cache.shape
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    out = torch.empty((queries, heads, value_dim), dtype=torch.float32)
    job = AttentionJob(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        query_starts.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        q.stride(0),
        q.stride(1),
        queries,
        context_lens.shape[0],
        block_tables.shape[1],
        heads,
        kv_heads,
        key_dim,
        value_dim,
        blocks,
        block_tokens,
        window,
        scale,
        softcap,
    )
    status = _paged_attention(job, _library.isa_number, _library.threads)
    if status == _NO_MEMORY:
        raise MemoryError("native paged_attention: no memory for its scratch")
    if status:
        raise IndexError("paged_attention: a block table, length or start points outside")
    return out


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
