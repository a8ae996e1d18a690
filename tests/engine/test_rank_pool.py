"""Device memory of adapters: contents always right, extents disjoint, memory given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_server.model.rank_pool import AffinePool, RankPool
from manylora_store.compiler.canonical import LowRank

IN, OUT = 3, 2
CPU = torch.device("cpu")


def factors(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        a=torch.randn(rank, IN, generator=generator),
        b=torch.randn(rank, OUT, generator=generator),
        scaling=seed + 0.5,
    )


def install(pool: RankPool, slot: int, low_rank: LowRank) -> None:
    pool.reserve(slot, low_rank)
    pool.fill(slot, low_rank)


def check(pool: RankPool, installed: dict[int, LowRank]) -> None:
    assert pool.extents.keys() == installed.keys()
    assert pool.a.shape[0] == pool.b.shape[0]
    taken: set[int] = set()
    for slot, expected in installed.items():
        start, rank, scaling = pool.extents[slot]
        rows = range(start, start + rank)
        assert rank == expected.rank, "a rank was padded or cut"
        assert scaling == expected.scaling
        assert rows.stop <= pool.a.shape[0]
        assert not taken & set(rows), "two extents overlap"
        taken |= set(rows)
        assert torch.equal(pool.a[start : rows.stop], expected.a.to(pool.a.dtype))
        assert torch.equal(pool.b[start : rows.stop], expected.b.to(pool.b.dtype))


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 16)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_history_of_installs_and_removals(history: list[tuple[int, int]]) -> None:
    pool = RankPool(IN, OUT, torch.float32, CPU)
    installed: dict[int, LowRank] = {}
    most = 0
    for seed, (slot, rank) in enumerate(history):
        if slot in installed:
            pool.remove(slot)
            del installed[slot]
        else:
            installed[slot] = factors(rank, seed)
            install(pool, slot, installed[slot])
        check(pool, installed)
        used = sum(f.rank for f in installed.values())
        most = max(most, used)
        assert pool.a.shape[0] <= max(most + 16, 1.5 * most)
        if slot not in installed:
            assert pool.a.shape[0] < max(4 * used, 1), "unused memory was kept"
    for slot in list(installed):
        pool.remove(slot)
    assert pool.a.shape[0] == 0


def test_removing_what_is_not_there_changes_nothing() -> None:
    pool = RankPool(IN, OUT, torch.float32, CPU)
    kept = factors(2, 1)
    install(pool, 1, kept)
    pool.remove(5)
    check(pool, {1: kept})


def test_a_gap_is_used_again() -> None:
    pool = RankPool(IN, OUT, torch.float32, CPU)
    installed = {slot: factors(4, slot) for slot in range(6)}
    for slot, low_rank in installed.items():
        install(pool, slot, low_rank)
    rows = pool.a.shape[0]
    pool.remove(2)
    installed[2] = factors(3, 9)
    install(pool, 2, installed[2])
    assert pool.extents[2].start == 8
    assert pool.a.shape[0] == rows
    check(pool, installed)


def test_factors_of_another_shape_change_no_other_slot() -> None:
    pool = RankPool(IN, OUT, torch.float32, CPU)
    kept = factors(2, 1)
    install(pool, 0, kept)
    wrong = LowRank(torch.ones(3, IN + 1), torch.ones(3, OUT), 1.0)
    with pytest.raises(RuntimeError):
        install(pool, 1, wrong)
    pool.remove(1)
    check(pool, {0: kept})
    with pytest.raises(AssertionError, match="removed first"):
        install(pool, 0, kept)


def test_factors_are_rounded_to_the_pool_s_dtype() -> None:
    pool = RankPool(IN, OUT, torch.bfloat16, CPU)
    low_rank = factors(5, 3)
    install(pool, 0, low_rank)
    check(pool, {0: low_rank})


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), max_size=40))
@settings(max_examples=200, deadline=None)
def test_affine_rows(history: list[tuple[int, bool, bool]]) -> None:
    pool = AffinePool(OUT, torch.float32, CPU)
    installed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for seed, (slot, with_scale, with_shift) in enumerate(history):
        if slot in installed:
            pool.remove(slot)
            del installed[slot]
        else:
            scale = torch.full((OUT,), seed + 2.0) if with_scale else None
            shift = torch.full((OUT,), -seed - 1.0) if with_shift else None
            pool.reserve(slot)
            pool.fill(slot, scale, shift)
            installed[slot] = (
                torch.ones(OUT) if scale is None else scale,
                torch.zeros(OUT) if shift is None else shift,
            )
        assert pool.rows.keys() == installed.keys()
        assert len(set(pool.rows.values())) == len(installed)
        for key, (scale, shift) in installed.items():
            assert torch.equal(pool.scale[pool.rows[key]], scale)
            assert torch.equal(pool.shift[pool.rows[key]], shift)
        assert pool.scale.shape[0] <= 6
        assert installed or pool.scale.shape[0] == 0
