"""A step's paged cache as native attention takes it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from manylora_kernels.native.program import LayerCache, Pages
from manylora_server.model.attention import KVCache, PagedAttention


class PageTable:
    """Keeps the addresses of the caches of ``layers``, in the order of the program's calls."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = layers
        self._cache: KVCache | None = None
        self._addresses = (LayerCache * 1)()

    def pages(self, attention: PagedAttention) -> Pages:
        """Return the structure for a step; it points into ``attention``'s tensors."""
        cache = attention.cache
        if cache is not self._cache:
            found = [cache.layers[layer] for layer in self._layers]
            self._addresses = (LayerCache * max(1, len(found)))(
                *(LayerCache(k.data_ptr(), v.data_ptr()) for k, v in found)
            )
            self._cache = cache
        return Pages(
            ctypes.addressof(self._addresses),
            attention.positions.data_ptr(),
            attention.block_tables.data_ptr(),
            attention.context_lens.data_ptr(),
            attention.query_starts.data_ptr(),
            attention.context_lens.shape[0],
            attention.block_tables.shape[1],
            cache.num_blocks,
            cache.block_tokens,
        )
