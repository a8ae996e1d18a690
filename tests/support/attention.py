"""Cases of ``paged_attention`` in a cache full of NaN, and the answer by loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from manylora_kernels import paged_attention

# A sequence's context length and how many of its last positions are queries.
MIXED = [(1, 1), (17, 1), (9, 1), (40, 1), (13, 13), (30, 7), (5, 2), (33, 32)]
DECODES = [(4, 1), (1, 1), (16, 1), (15, 1), (33, 1)]
# From 1 to 700 keys: several buckets.
RAGGED = [(700, 1), (1, 1), (64, 1), (67, 1), (300, 1), (2, 1)]


@dataclass(frozen=True)
class Case:
    lengths: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    block_tokens: int = 4
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


CASES = {
    "no groups": Case(MIXED, heads=3, kv_heads=3),
    "groups of two": Case(MIXED),
    "groups of four": Case(MIXED, heads=8),
    "one key head": Case(MIXED, heads=5, kv_heads=1),
    "blocks of one": Case(MIXED, block_tokens=1),
    "blocks of sixteen": Case(MIXED, block_tokens=16),
    "values narrower than keys": Case(MIXED, key_dim=12, value_dim=6),
    "values wider than keys": Case(DECODES, key_dim=4, value_dim=10),
    "window of one": Case(MIXED, window=1),
    "window of six": Case(MIXED, window=6),
    "window wider than all": Case(MIXED, window=1000),
    "softcap": Case(MIXED, softcap=3.0),
    "sinks": Case(MIXED, sinks=True),
    "softcap, sinks and window": Case(
        MIXED, heads=8, softcap=2.0, sinks=True, window=5, value_dim=6, block_tokens=16
    ),
    "decodes only": Case(DECODES),
    "decodes with sinks, one key head": Case(DECODES, heads=4, kv_heads=1, sinks=True),
    "prefills only": Case([(7, 7), (21, 3), (16, 16)]),
    "one prefill from an offset": Case([(50, 9)], window=12),
    "lengths of several buckets": Case(RAGGED, block_tokens=16),
    "several buckets with softcap": Case(RAGGED, softcap=4.0, sinks=True, window=70),
    "one decode": Case([(6, 1)]),
}


@dataclass
class Batch:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor
    decodes: int
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sinks: torch.Tensor | None

    def run(self, case: Case, scale: float = 0.4) -> torch.Tensor:
        return paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.tables,
            self.contexts,
            self.starts,
            self.decodes,
            scale,
            case.window,
            case.softcap,
            self.sinks,
        )


def make(case: Case, dtype: torch.dtype, spare_blocks: int = 0) -> Batch:
    """Scatter random contexts over shuffled blocks of a cache that is NaN everywhere else.

    ``spare_blocks`` more than its context needs are in each sequence's table, still unwritten.
    """
    generator = torch.Generator().manual_seed(len(case.lengths) + case.heads)

    def signed(*shape: int) -> torch.Tensor:
        noise = torch.randn(*shape, generator=generator)
        return (noise + 0.1 * noise.sign()).to(dtype)

    size = case.block_tokens
    counts = [-(-length // size) + spare_blocks for length, _ in case.lengths]
    total = sum(counts) + 4
    order = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    k_cache = torch.full((total, size, case.kv_heads, case.key_dim), math.nan, dtype=dtype)
    v_cache = torch.full((total, size, case.kv_heads, case.value_dim), math.nan, dtype=dtype)
    k_cache[0] = 0
    v_cache[0] = 0
    tables = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int32)
    keys, values = [], []
    for row, (length, _) in enumerate(case.lengths):
        own = [order.pop() for _ in range(counts[row])]
        tables[row, : len(own)] = torch.tensor(own)
        keys.append(signed(length, case.kv_heads, case.key_dim))
        values.append(signed(length, case.kv_heads, case.value_dim))
        for position in range(length):
            block = own[position // size]
            k_cache[block, position % size] = keys[row][position]
            v_cache[block, position % size] = values[row][position]
    queries = [count for _, count in case.lengths]
    starts = torch.tensor([sum(queries[:i]) for i in range(len(queries) + 1)], dtype=torch.int32)
    return Batch(
        q=signed(sum(queries), case.heads, case.key_dim),
        k_cache=k_cache,
        v_cache=v_cache,
        tables=tables,
        contexts=torch.tensor([length for length, _ in case.lengths], dtype=torch.int32),
        starts=starts,
        decodes=next((i for i, n in enumerate(queries) if n > 1), len(queries)),
        keys=keys,
        values=values,
        sinks=signed(case.heads) if case.sinks else None,
    )


def oracle(case: Case, batch: Batch, scale: float = 0.4) -> torch.Tensor:
    """The docstring's equation, one query and head at a time, without subtracting a maximum."""
    out = torch.empty(batch.q.shape[0], case.heads, case.value_dim, dtype=torch.float64)
    for row, (length, count) in enumerate(case.lengths):
        first = int(batch.starts[row])
        for index in range(count):
            position = length - count + index
            seen = [
                j
                for j in range(position + 1)
                if not case.window or position - case.window < j <= position
            ]
            for head in range(case.heads):
                kv_head = head // (case.heads // case.kv_heads)
                query = batch.q[first + index, head].double()
                scores = scale * (batch.keys[row][seen, kv_head].double() * query).sum(dim=1)
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                weights = scores.exp()
                total = weights.sum()
                if batch.sinks is not None:
                    total = total + batch.sinks[head].double().exp()
                chosen = batch.values[row][seen, kv_head].double()
                out[first + index, head] = (weights[:, None] * chosen).sum(dim=0) / total
    return out
