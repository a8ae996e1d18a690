"""Paged attention by Triton against the equation in float64, in a cache of nothing but NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from manylora_kernels import paged_attention
from support.triton import (  # noqa: F401 - a fixture
    DEVICE,
    DTYPES,
    requires_triton,
    signed,
    triton_selected,
)

pytestmark = [
    requires_triton,
    pytest.mark.usefixtures("triton_selected"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# A sequence's context length and how many of its last positions are queries.
MIXED = [(1, 1), (70, 1), (13, 13), (90, 25), (5, 2), (3, 3)]
# More than one partition of 256 keys, ends on both sides of one.
LONG = [(600, 1), (3, 1), (256, 1), (257, 1)]
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    lengths: list[tuple[int, int]] = field(default_factory=lambda: MIXED)
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16
    block_tokens: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


CASES = {
    "groups of two": Case(),
    "no groups, blocks of one": Case(heads=2, block_tokens=1),
    "groups of five": Case(heads=5, kv_heads=1),
    "dims of no power of two": Case(key_dim=12, value_dim=20, block_tokens=4),
    "dims over 128": Case(key_dim=130, value_dim=24),
    "window of one": Case(window=1),
    "window of six": Case(window=6, block_tokens=4),
    "window wider than all": Case(window=1000),
    "softcap": Case(softcap=3.0),
    "sinks": Case(sinks=True),
    "all at once": Case(
        heads=6, key_dim=6, softcap=2.0, sinks=True, window=40, block_tokens=4, value_dim=8
    ),
    "partitions": Case(LONG),
    "partitions, all at once": Case(LONG, heads=3, kv_heads=1, softcap=4.0, sinks=True, window=300),
    "partitions out of the window": Case(LONG, window=3, sinks=True),
    "a long prefill": Case([(130, 1), (290, 150)], window=100),
}


@dataclass
class Batch:
    case: Case
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sinks: torch.Tensor | None

    def run(self, rows: list[int] | None = None) -> list[torch.Tensor]:
        """Return each sequence's result, with the others in the batch or only ``rows``."""
        chosen = range(len(self.case.lengths)) if rows is None else rows
        counts = [count for _, count in self.case.lengths]
        starts = [sum(counts[:row]) for row in range(len(counts))]
        lengths = [self.case.lengths[row] for row in chosen]
        offsets = [sum(count for _, count in lengths[:i]) for i in range(len(lengths) + 1)]
        got = paged_attention(
            torch.cat([self.q[starts[row] : starts[row] + counts[row]] for row in chosen]),
            self.k_cache,
            self.v_cache,
            self.tables[list(chosen)],
            torch.tensor([n for n, _ in lengths], dtype=torch.int32, device=DEVICE),
            torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
            next((i for i, (_, count) in enumerate(lengths) if count > 1), len(lengths)),
            SCALE,
            self.case.window,
            self.case.softcap,
            self.sinks,
        )
        return list(got.split([count for _, count in lengths]))


def make(case: Case, dtype: torch.dtype = torch.float32) -> Batch:
    """Contexts over shuffled blocks; three blocks more in each table, still unwritten."""
    size = case.block_tokens
    counts = [-(-length // size) + 3 for length, _ in case.lengths]
    order = torch.randperm(sum(counts) + 4, generator=torch.Generator().manual_seed(1)) + 1
    shape = (len(order) + 1, size, case.kv_heads)
    k_cache = torch.full((*shape, case.key_dim), math.nan, dtype=dtype, device=DEVICE)
    v_cache = torch.full((*shape, case.value_dim), math.nan, dtype=dtype, device=DEVICE)
    tables = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int32)
    keys, values = [], []
    for row, (length, _) in enumerate(case.lengths):
        own, order = order[: counts[row]], order[counts[row] :]
        tables[row, : len(own)] = own
        keys.append(signed(length, case.kv_heads, case.key_dim, seed=2 * row, dtype=dtype))
        values.append(signed(length, case.kv_heads, case.value_dim, seed=2 * row + 1, dtype=dtype))
        places = torch.arange(length)
        blocks = own[places // size].to(DEVICE)
        k_cache[blocks, places % size] = keys[row]
        v_cache[blocks, places % size] = values[row]
    tokens = sum(count for _, count in case.lengths)
    return Batch(
        case=case,
        q=signed(tokens, case.heads, case.key_dim, seed=99, dtype=dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        tables=tables.to(DEVICE),
        keys=keys,
        values=values,
        sinks=signed(case.heads, seed=98, dtype=dtype) if case.sinks else None,
    )


def oracle(batch: Batch) -> list[torch.Tensor]:
    """The equation of ``ops.paged_attention``, one sequence at a time in float64."""
    case, results, first = batch.case, [], 0
    for (length, count), key, value in zip(case.lengths, batch.keys, batch.values, strict=True):
        q = batch.q[first : first + count].double()
        first += count
        groups = case.heads // case.kv_heads
        k, v = (t.double().repeat_interleave(groups, dim=1) for t in (key, value))
        scores = SCALE * torch.einsum("qhd,jhd->hqj", q, k)
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        at = torch.arange(length - count, length, device=DEVICE)[:, None]
        j = torch.arange(length, device=DEVICE)
        visible = (j <= at) & (j > at - case.window) if case.window else j <= at
        weights = scores.exp() * visible
        total = weights.sum(dim=2, keepdim=True)
        if batch.sinks is not None:
            total = total + batch.sinks.double().exp()[:, None, None]
        results.append(torch.einsum("hqj,jhd->qhd", weights / total, v))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equation(name: str, dtype: torch.dtype) -> None:
    batch = make(CASES[name], dtype)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    limit = 8e-6 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    for got, expected in zip(batch.run(), oracle(batch), strict=True):
        assert got.dtype == dtype
        assert not got.isnan().any()
        assert float((got.double() - expected).abs().max()) < limit


@pytest.mark.parametrize("name", ["all at once", "groups of two", "partitions"])
def test_a_query_s_result_does_not_depend_on_the_batch(name: str) -> None:
    batch = make(CASES[name])
    together = batch.run()
    for row in range(len(together)):
        assert torch.equal(batch.run([row])[0], together[row]), row


def test_chunks_of_a_prefill_give_what_the_whole_gives() -> None:
    whole = make(Case([(90, 90)], window=30))
    chunk = replace(whole, case=replace(whole.case, lengths=[(90, 37)]), q=whole.q[53:])
    assert torch.equal(chunk.run()[0], whole.run()[0][53:])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sequence_of_nan_reaches_no_other(poison: float) -> None:
    batch = make(CASES["groups of two"])
    clean = batch.run()
    for row in (1, 3):
        blocks = batch.tables[row][batch.tables[row] > 0].long()
        saved = batch.k_cache[blocks], batch.v_cache[blocks]
        batch.k_cache[blocks], batch.v_cache[blocks] = poison, poison
        got = batch.run()
        batch.k_cache[blocks], batch.v_cache[blocks] = saved
        assert not got[row].isfinite().any()
        for other in set(range(len(clean))) - {row}:
            assert torch.equal(got[other], clean[other])


def test_pages_that_left_the_window_may_be_another_s() -> None:
    """A table's blocks before the window are never read, whatever number is in their place."""
    batch = make(Case([(600, 1), (90, 25)], window=20))
    clean = batch.run()
    batch.tables[0, : (600 - 20) // 16] = 0
    batch.tables[1, : (90 - 25 - 19) // 16] = 0
    assert all(map(torch.equal, batch.run(), clean))


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("width", [2, 40], ids=["one partition", "several"])
def test_a_sequence_without_keys_is_padding(width: int, sinks: bool) -> None:
    cache = torch.full((3, 16, 2, 16), math.nan, device=DEVICE)
    got = paged_attention(
        signed(2, 4, 16, seed=1),
        cache,
        cache,
        torch.zeros(2, width, dtype=torch.int32, device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
        torch.arange(3, dtype=torch.int32, device=DEVICE),
        2,
        SCALE,
        0,
        0.0,
        signed(4, seed=2) if sinks else None,
    )
    assert torch.equal(got, torch.zeros_like(got))
