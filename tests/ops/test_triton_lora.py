"""The segmented low-rank kernels against loops in float64, in pools and scratch full of NaN."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from manylora_kernels import RankExtent, Segment, SegmentMap, lora_delta_
from manylora_kernels.tile_plan import cut
from support.triton import (  # noqa: F401 - a fixture
    DEVICE,
    DTYPES,
    assert_within,
    requires_triton,
    signed,
    triton_selected,
)

pytestmark = [
    requires_triton,
    pytest.mark.usefixtures("triton_selected"),
    # The interpreter is numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# No multiples of a block; ``in`` is more than one part of the sum.
IN, OUT = 557, 150
EXTENTS = {
    0: RankExtent(1, 1, -0.75),
    1: RankExtent(3, 5, 1.5),
    2: RankExtent(8, 16, 0.5),
    3: RankExtent(26, 33, 2.0),
    4: RankExtent(60, 64, -1.0),
}
POOL_ROWS = 127
# From 0 to 40: both ends, base rows between, every rank, a long run, a slot twice, one in none.
SEGMENTS = [
    Segment(0, 1, 4),
    Segment(1, 2, 1),
    Segment(3, 22, 2),
    Segment(22, 24, 3),
    Segment(30, 33, 0),
    Segment(38, 40, 2),
]
MIX = [
    Segment(0, 20, 0, 0.25),
    Segment(0, 20, 3, -1.5),
    Segment(10, 25, 2, 0.5),
    Segment(30, 40, 1, 1.0),
    Segment(30, 40, 0, 3.0),
    Segment(5, 5, 4),
]
TOKENS = 40


def pools(dtype: torch.dtype, poison: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors; rows that no extent owns are ``poison``."""
    a = signed(POOL_ROWS, IN, seed=1, dtype=dtype) / math.sqrt(IN)
    b = signed(POOL_ROWS, OUT, seed=2, dtype=dtype)
    owned = {row for e in EXTENTS.values() for row in range(e.start, e.start + e.rank)}
    unused = [row for row in range(POOL_ROWS) if row not in owned]
    a[unused], b[unused] = poison, poison
    return a, b


def apply(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    segments: list[Segment],
) -> torch.Tensor:
    runs = SegmentMap(segments, x.shape[0], device=DEVICE, dtype=x.dtype).resolve(EXTENTS)
    assert runs is not None
    result = y.clone()
    lora_delta_(result, x, *factors, runs)
    return result


def oracle(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    segments: list[Segment],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The equation in float64, and the sum of all terms' sizes."""
    result, size = y.double(), y.double().abs()
    a, b = (factor.double() for factor in factors)
    for start, end, slot, weight in segments:
        first, rank, scaling = EXTENTS[slot]
        rows, own = slice(first, first + rank), x[start:end].double()
        result[start:end] += scaling * weight * (own @ a[rows].t()) @ b[rows]
        terms = own.abs() @ a[rows].abs().t() @ b[rows].abs()
        size[start:end] += abs(scaling * weight) * terms
    return result, size


@pytest.fixture(autouse=True)
def _scratch_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the backend does not write must not be read: fill it with NaN."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr("manylora_kernels.gpu.lora.torch.empty", filled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [SEGMENTS, MIX], ids=["disjoint", "mixes"])
def test_equals_the_equation(segments: list[Segment], dtype: torch.dtype) -> None:
    factors = pools(dtype)
    x, y = signed(TOKENS, IN, seed=3, dtype=dtype), signed(TOKENS, OUT, seed=4, dtype=dtype)
    got = apply(y, x, factors, segments)
    expected, size = oracle(y, x, factors, segments)
    # float32: each of some hundred sums rounds; half precision: the projection and the result.
    assert_within(got, expected, size, 4 if dtype == torch.float32 else 1)
    inside = torch.zeros(TOKENS, dtype=torch.bool, device=DEVICE)
    for start, end, *_ in segments:
        inside[start:end] = True
    assert torch.equal(got[~inside], y[~inside])
    assert not torch.isclose(got[inside], y[inside]).all(dim=1).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("slot", [1, 4])
def test_another_adapter_s_poison_reaches_no_token(slot: int, poison: float) -> None:
    a, b = pools(torch.float32, poison)
    x, y = signed(TOKENS, IN, seed=3), signed(TOKENS, OUT, seed=4)
    clean = apply(y, x, (a, b), SEGMENTS)
    rows = slice(EXTENTS[slot].start, EXTENTS[slot].start + EXTENTS[slot].rank)
    a[rows], b[rows] = poison, poison
    got = apply(y, x, (a, b), SEGMENTS)
    for segment in SEGMENTS:
        own = slice(segment.start, segment.end)
        if segment.slot == slot:
            assert not got[own].isfinite().any(), "its own poison must not be hidden"
        else:
            assert torch.equal(got[own], clean[own])


@pytest.mark.parametrize("base", [-0.0, math.nan, math.inf])
def test_rows_in_no_segment_keep_their_bits(base: float) -> None:
    x, y = signed(TOKENS, IN, seed=3), signed(TOKENS, OUT, seed=4)
    outside = [t for t in range(TOKENS) if not any(s.start <= t < s.end for s in SEGMENTS)]
    y[outside], x[outside] = base, math.nan
    got = apply(y, x, pools(torch.float32), SEGMENTS)
    assert torch.equal(got[outside].view(torch.int32), y[outside].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_s_result_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    factors = pools(dtype)
    x, y = signed(TOKENS, IN, seed=3, dtype=dtype), signed(TOKENS, OUT, seed=4, dtype=dtype)
    together = apply(y, x, factors, SEGMENTS)
    for token, slot in ((0, 4), (1, 1), (10, 2), (21, 2), (23, 3), (39, 2)):
        alone = apply(y[token : token + 1], x[token : token + 1], factors, [Segment(0, 1, slot)])
        assert torch.equal(alone[0], together[token]), token


def test_a_mix_is_the_same_whatever_else_is_in_the_batch() -> None:
    factors = pools(torch.float32)
    x, y = signed(TOKENS, IN, seed=3), signed(TOKENS, OUT, seed=4)
    together = apply(y, x, factors, MIX)
    alone = apply(y[12:14], x[12:14], factors, [Segment(0, 2, s.slot, s.weight) for s in MIX[:3]])
    assert torch.equal(together[12:14], alone)


def test_inputs_may_be_parts_of_larger_tensors() -> None:
    wide_x = torch.full((TOKENS + 2, IN + 3), math.nan, device=DEVICE)
    wide_y = torch.full((TOKENS + 2, OUT + 5), 7.0, device=DEVICE)
    x, y = wide_x[1:-1, 2 : IN + 2], wide_y[1:-1, 3 : OUT + 3]
    x.copy_(signed(TOKENS, IN, seed=3))
    y.copy_(signed(TOKENS, OUT, seed=4))
    factors = pools(torch.float32)
    expected = apply(y.clone(), x.contiguous(), factors, SEGMENTS)
    runs = SegmentMap(SEGMENTS, TOKENS, device=DEVICE).resolve(EXTENTS)
    assert runs is not None
    lora_delta_(y, x, *factors, runs)
    assert torch.equal(y, expected)
    wide_y[1:-1, 3 : OUT + 3] = 7.0
    assert torch.equal(wide_y, torch.full_like(wide_y, 7.0))


def test_rows_of_zeros_in_the_tables_are_padding() -> None:
    factors = pools(torch.float32)
    x, y = signed(TOKENS, IN, seed=3), signed(TOKENS, OUT, seed=4)
    runs = SegmentMap(SEGMENTS, TOKENS, device=DEVICE).resolve(EXTENTS)
    assert runs is not None
    got = y.clone()
    padded = [torch.cat((table, table.new_zeros(5, 5))) for table in runs.plan]
    nothing = (None, None, None, None, 0)
    torch.ops.manylora.lora_delta_(got, x, *factors, runs.segments, runs.weights, *nothing, padded)
    assert torch.equal(got, apply(y, x, factors, SEGMENTS))


def test_what_is_not_ours_is_the_reference_s() -> None:
    factors = tuple(factor.double() for factor in pools(torch.float32))
    x, y = signed(TOKENS, IN, seed=3).double(), signed(TOKENS, OUT, seed=4).double()
    got = apply(y, x, factors, SEGMENTS)  # type: ignore[arg-type]
    torch.testing.assert_close(got, oracle(y, x, factors, SEGMENTS)[0])  # type: ignore[arg-type]


def test_opcheck() -> None:
    runs = SegmentMap([Segment(0, 2, 0), Segment(3, 5, 1)], 6, device=DEVICE).resolve(EXTENTS)
    assert runs is not None
    a, b = pools(torch.float32, 0.0)
    arguments = (signed(6, OUT, seed=1), signed(6, IN, seed=2), a, b, runs.segments, runs.weights)
    call = (*arguments, None, None, None, None, 0, list(runs.plan))
    outcome = torch.library.opcheck(torch.ops.manylora.lora_delta_.default, call)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_the_tables_cover_each_token_once_and_each_term_once() -> None:
    runs = [
        (s.start, s.end, e.start, e.start + e.rank, e.scaling * s.weight)
        for s in MIX
        for e in [EXTENTS[s.slot]]
    ]
    items, cells = cut(runs)
    covered = [token for first, count, *_ in cells for token in range(first, first + count)]
    assert covered == sorted({t for s in MIX for t in range(s.start, s.end)})
    assert [i for *_, first, count, _ in cells for i in range(first, first + count)] == [
        *range(len(items))
    ]
    found = []
    for token, count, first, n, _ in cells:
        assert 1 <= count <= 16
        for item in items[first : first + n]:
            assert item[:2] == (token, count)
            assert 1 <= item[3] <= 16
            bits = torch.tensor(item[4], dtype=torch.int32).view(torch.float32).item()
            for t in range(token, token + count):
                found += [(t, row, bits) for row in range(item[2], item[2] + item[3])]
    expected = [
        (t, row, weight)
        for start, end, r0, r1, weight in runs
        for t in range(start, end)
        for row in range(r0, r1)
    ]
    assert sorted(found) == sorted(expected)
    for before, after in pairwise(cells):
        assert before[0] + before[1] <= after[0]
