"""Buckets of decode steps, and the tensors at fixed addresses that a CUDA graph reads for one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch

from manylora_server.model.attention import KVCache, PagedAttention
from manylora_server.model.batch import Chunk

MOST_SEQUENCES = 256
# As many blocks as one partition of the attention kernel's keys has, at 16 tokens a block.
LEAST_WIDTH = 16


def batch_bucket(sequences: int) -> int | None:
    """Return how many rows a step of ``sequences`` is padded to; ``None``: too many for a graph.

    1, 2, 4, 8, then multiples of 8, beyond 64 of 16: at most half of a small batch is padding, and
    a twentieth of a large one.
    """
    if sequences > MOST_SEQUENCES:
        return None
    if sequences <= 8:
        return 1 << (sequences - 1).bit_length()
    multiple = 8 if sequences <= 64 else 16
    return -(-sequences // multiple) * multiple


def width_bucket(blocks: int) -> int:
    """Return how many blocks a step's tables are padded to: a power of two."""
    return max(LEAST_WIDTH, 1 << (blocks - 1).bit_length())


def depth_bucket(adapters: int) -> int:
    """Return for how many adapters a row a step has tables: none, or a power of two."""
    return 1 << (adapters - 1).bit_length() if adapters else 0


class StaticInputs:
    """The inputs of decode steps of up to ``batch`` sequences of up to ``width`` blocks.

    Rows beyond a step's own are padding: token 0 at position 0, of a context without keys, whose
    own key and value are stored nowhere (position -1 in the cache).
    """

    def __init__(self, cache: KVCache, batch: int, width: int, device: torch.device) -> None:
        self.batch = batch
        self.width = width
        self._block_tokens = cache.block_tokens
        # Token ids, positions, places in the cache; then context lengths and block tables.
        self._wide = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(batch * (1 + width), dtype=torch.int32, device=device)
        self.input_ids = self._wide[0:1]
        self.position_ids = self._wide[1:2]
        self.attention = PagedAttention(
            cache=cache,
            positions=self._wide[2],
            block_tables=self._narrow[batch:].view(batch, width),
            context_lens=self._narrow[:batch],
            query_starts=torch.arange(batch + 1, dtype=torch.int32, device=device),
            num_decodes=batch,
        )
        self.fill(())

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Describe a step of ``chunks`` of one token each, the rest being padding."""
        size = self._block_tokens
        padding = self.batch - len(chunks)
        wide = [
            [*(chunk.token_ids[0] for chunk in chunks), *repeat(0, padding)],
            [*(chunk.start for chunk in chunks), *repeat(0, padding)],
            [
                *(c.block_table[c.start // size] * size + c.start % size for c in chunks),
                *repeat(-1, padding),
            ],
        ]
        narrow = [*(chunk.start + 1 for chunk in chunks), *repeat(0, padding)]
        for chunk in chunks:
            narrow += chunk.block_table
            narrow += repeat(0, self.width - len(chunk.block_table))
        narrow += repeat(0, padding * self.width)
        put(self._wide, wide)
        put(self._narrow, narrow)


def put(target: torch.Tensor, values: Sequence[object]) -> None:
    """Copy ``values`` to ``target``, from pinned memory and without waiting on a GPU."""
    source = torch.tensor(values, dtype=target.dtype)
    if target.is_cuda:
        # The allocator of pinned memory does not give it out again before the copy is over.
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
