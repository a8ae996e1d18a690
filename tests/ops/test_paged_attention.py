"""``paged_attention`` against loops over every query, head and key, in a cache full of NaN."""

from __future__ import annotations

import math

import pytest
import torch

from manylora_kernels import paged_attention
from support.attention import CASES, DECODES, MIXED, Case, make, oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equation(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    batch = make(case, dtype)
    got = batch.run(case)
    assert got.dtype == dtype
    assert not got.isnan().any()
    limit = 8e-6 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    assert float((got.double() - oracle(case, batch)).abs().max()) < limit


@pytest.mark.parametrize("name", CASES)
def test_blocks_given_ahead_of_the_context_may_hold_anything(name: str) -> None:
    case = CASES[name]
    batch = make(case, torch.float32, spare_blocks=3)
    got = batch.run(case)
    assert not got.isnan().any()
    assert float((got.double() - oracle(case, batch)).abs().max()) < 8e-6


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_sequence_of_nan_reaches_no_other(poison: float) -> None:
    case = Case(MIXED)
    batch = make(case, torch.float32)
    clean = batch.run(case)
    for row in range(len(case.lengths)):
        blocks = batch.tables[row][batch.tables[row] > 0].long()
        saved = batch.k_cache[blocks], batch.v_cache[blocks]
        batch.k_cache[blocks] = poison
        batch.v_cache[blocks] = poison
        got = batch.run(case)
        batch.k_cache[blocks], batch.v_cache[blocks] = saved
        own = slice(int(batch.starts[row]), int(batch.starts[row + 1]))
        assert not got[own].isfinite().all()
        got[own] = clean[own]
        assert torch.equal(got, clean)


def test_each_sequence_alone_gets_what_it_gets_in_the_batch() -> None:
    case = Case(MIXED, window=9, sinks=True, heads=8)
    batch = make(case, torch.float32)
    together = batch.run(case)
    for row, (length, count) in enumerate(case.lengths):
        own = slice(int(batch.starts[row]), int(batch.starts[row + 1]))
        alone = paged_attention(
            batch.q[own],
            batch.k_cache,
            batch.v_cache,
            batch.tables[row : row + 1],
            torch.tensor([length], dtype=torch.int32),
            torch.tensor([0, count], dtype=torch.int32),
            int(count == 1),
            0.4,
            case.window,
            0.0,
            batch.sinks,
        )
        torch.testing.assert_close(together[own], alone, atol=2e-6, rtol=0)


def test_the_cache_is_not_written_to() -> None:
    case = Case(MIXED)
    batch = make(case, torch.float32)
    before = batch.k_cache.clone(), batch.v_cache.clone()
    batch.run(case)
    for cache, saved in zip((batch.k_cache, batch.v_cache), before, strict=True):
        assert torch.equal(cache.view(torch.int32), saved.view(torch.int32))


def test_heads_that_do_not_divide_are_refused() -> None:
    case = Case(DECODES)
    batch = make(case, torch.float32)
    batch.q = torch.zeros(5, 3, 8)
    with pytest.raises(ValueError, match="2 kv heads do not divide 3 query heads"):
        batch.run(case)
