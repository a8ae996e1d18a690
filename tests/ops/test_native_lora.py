"""The native segmented low-rank product on every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_kernels import RankExtent, Segment, SegmentMap, lora_delta_, native
from support.native import NAN, native_kernels, random, surrounded

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

# (in, out): single elements, vector tails on both sides, more than one item of outputs (256).
SHAPES = [(1, 1), (3, 70), (37, 21), (64, 64), (96, 300), (130, 515)]
# Slot -> extent; rows between them belong to nobody and are NaN.
EXTENTS = {
    0: RankExtent(1, 2, -0.75),
    1: RankExtent(5, 5, 1.5),
    2: RankExtent(11, 16, 0.5),
    3: RankExtent(29, 1, 2.0),
    4: RankExtent(31, 64, 0.25),
}
POOL_ROWS = 97
# All ranks, neighbours and gaps, one slot twice, a segment longer than an item (64 tokens).
RAGGED = [
    Segment(0, 9, 0),
    Segment(12, 13, 2),
    Segment(13, 30, 1),
    Segment(31, 111, 3),
    Segment(111, 120, 4),
    Segment(121, 123, 2),
]


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native_kernels(request.param):
        yield request.param


def pools(columns: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    owned = {row for e in EXTENTS.values() for row in range(e.start, e.start + e.rank)}
    unowned = [row for row in range(POOL_ROWS) if row not in owned]
    a, b = random(POOL_ROWS, columns, seed=1), random(POOL_ROWS, outputs, seed=2)
    a[unowned] = NAN
    b[unowned] = NAN
    return a, b


def apply(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: list[Segment],
    extents: dict[int, RankExtent] = EXTENTS,
) -> torch.Tensor:
    runs = SegmentMap(segments, x.shape[0]).resolve(extents)
    assert runs is not None
    result = surrounded(y)
    lora_delta_(result, x, a, b, runs)
    return result


def check(
    got: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: list[Segment],
) -> None:
    """Compare with float64, within the rounding of float32 sums of the terms' sizes."""
    expected, size = y.double(), y.double().abs()
    for start, end, slot, weight in segments:
        first, rank, scaling = EXTENTS[slot]
        rows = slice(first, first + rank)
        a64, b64, x64 = a[rows].double(), b[rows].double(), x[start:end].double()
        expected[start:end] += weight * scaling * (x64 @ a64.t()) @ b64
        size[start:end] += abs(weight * scaling) * (x64.abs() @ a64.abs().t()) @ b64.abs()
    assert bool(((got.double() - expected).abs() <= 1e-6 * size + 1e-9).all())


@pytest.mark.parametrize(("columns", "outputs"), SHAPES)
def test_ragged_segments_of_mixed_ranks(columns: int, outputs: int, isa: str) -> None:
    a, b = pools(columns, outputs)
    x, y = random(124, columns, seed=3), random(124, outputs, seed=4)
    got = apply(y, x, a, b, RAGGED)
    check(got, y, x, a, b, RAGGED)
    covered = {t for s in RAGGED for t in range(s.start, s.end)}
    others = [t for t in range(124) if t not in covered]
    assert torch.equal(got[others], y[others])


def test_base_rows_may_hold_anything(isa: str) -> None:
    a, b = pools(37, 21)
    x, y = random(20, 37, seed=3), random(20, 21, seed=4)
    x[4] = NAN
    y[9] = math.inf
    segments = [Segment(0, 4, 2), Segment(5, 9, 1)]
    got = apply(y, x, a, b, segments)
    rows = [*range(4), *range(5, 9)]
    assert bool(got[rows].isfinite().all())
    assert torch.equal(got[9], y[9])
    assert torch.equal(got[4], y[4])


def test_a_row_that_is_not_finite_stays_alone(isa: str) -> None:
    a, b = pools(37, 21)
    x, y = random(8, 37, seed=3), random(8, 21, seed=4)
    x[2, 5] = math.inf
    got = apply(y, x, a, b, [Segment(0, 8, 2)])
    assert got.isfinite().all(dim=1).tolist() == [t != 2 for t in range(8)]


def test_a_mix_adds_its_parts_in_order(isa: str) -> None:
    a, b = pools(64, 96)
    x, y = random(6, 64, seed=3), random(6, 96, seed=4)
    segments = [Segment(0, 6, 0, 0.7), Segment(0, 6, 2, -0.3), Segment(2, 4, 1, 1.0)]
    got = apply(y, x, a, b, segments)
    check(got, y, x, a, b, segments)


def test_strided_rows(isa: str) -> None:
    a, b = pools(37, 21)
    x, y = random(12, 50, seed=3)[:, 5:42], random(12, 30, seed=4)
    runs = SegmentMap([Segment(1, 12, 2)], 12).resolve(EXTENTS)
    assert runs is not None
    got = y.clone()
    lora_delta_(got[:, 4:25], x, a, b, runs)
    check(got[:, 4:25], y[:, 4:25], x, a, b, [Segment(1, 12, 2)])
    outside = [*range(4), *range(25, 30)]
    assert torch.equal(got[:, outside], y[:, outside])


@settings(max_examples=25, deadline=None)
@given(
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    slot=st.sampled_from(sorted(EXTENTS)),
)
@pytest.mark.parametrize("name", native.library.isas)
def test_a_token_s_bits_do_not_depend_on_the_batch(name: str, starts: list[int], slot: int) -> None:
    with native_kernels(name):
        a, b = pools(96, 300)
        x, y = random(1, 96, seed=3), random(1, 300, seed=4)
        alone = apply(y, x, a, b, [Segment(0, 1, slot)])
        rows, outputs = random(90, 96, seed=5), random(90, 300, seed=6)
        places = sorted({min(s + 17 * i, 88) for i, s in enumerate(starts)})
        rows[places], outputs[places] = x, y
        ends = [*places[1:], 90]
        others = [other for other in EXTENTS if other != slot]
        segments = []
        for index, (place, end) in enumerate(zip(places, ends, strict=True)):
            length = 1 + index * 3 % (end - place)
            segments.append(Segment(place, place + length, slot))
            if place + length < end:
                segments.append(Segment(place + length, end, others[index % len(others)]))
        got = apply(outputs, rows, a, b, segments)
        for place in places:
            assert torch.equal(got[place], alone[0])


def test_threads_change_no_bits(isa: str) -> None:
    a, b = pools(130, 515)
    x, y = random(124, 130, seed=3), random(124, 515, seed=4)
    alone = apply(y, x, a, b, RAGGED)
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            assert torch.equal(apply(y, x, a, b, RAGGED), alone)
    finally:
        torch.set_num_threads(1)


def test_more_segments_than_fit_on_the_stack(isa: str) -> None:
    a, b = pools(37, 21)
    x, y = random(100, 37, seed=3), random(100, 21, seed=4)
    segments = [Segment(t, t + 1, t % 5) for t in range(100)]
    check(apply(y, x, a, b, segments), y, x, a, b, segments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_16_bits_are_widened(dtype: torch.dtype, isa: str) -> None:
    a, b = (surrounded(pool.to(dtype)) for pool in pools(37, 70))
    x, y = random(124, 37, seed=3), random(124, 70, seed=4)
    got = apply(y, x, a, b, RAGGED)
    check(got, y, x, a, b, RAGGED)
    widened = apply(y, x, a.float(), b.float(), RAGGED)
    assert torch.equal(got.nan_to_num(), widened.nan_to_num())


def test_every_value_of_16_bits_is_widened_exactly(isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[values.isfinite()].contiguous()
        # One rank, a factor of 1, and x of 1: what is added to 0 is the value itself.
        a = torch.ones(1, 1, dtype=dtype)
        runs = SegmentMap([Segment(0, 1, 0)], 1).resolve({0: RankExtent(0, 1, 1.0)})
        assert runs is not None
        y = torch.zeros(1, len(values))
        lora_delta_(y, torch.ones(1, 1), a, values[None], runs)
        assert torch.equal(y[0], values.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_by_the_reference(dtype: torch.dtype, isa: str) -> None:
    a, b = (pool.to(dtype) for pool in pools(37, 21))
    x, y = random(12, 37, seed=3).to(dtype), random(12, 21, seed=4).to(dtype)
    got = apply(y, x, a, b, [Segment(0, 12, 2)])
    first, rank, scaling = EXTENTS[2]
    rows = slice(first, first + rank)
    expected = y.double() + scaling * (x.double() @ a[rows].double().t()) @ b[rows].double()
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.2)
