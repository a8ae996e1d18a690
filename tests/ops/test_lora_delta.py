"""``lora_delta_`` against float64 loops, in its dense and its looped form, with poisoned pools."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_kernels import RankExtent, RankSegments, Segment, SegmentMap, lora_delta_

IN, OUT = 37, 21
# Slot -> (first rank row, rank, scaling); rows 0, 3..4, 10, 27..28 belong to nobody.
EXTENTS = {
    0: RankExtent(1, 2, -0.75),
    1: RankExtent(5, 5, 1.5),
    2: RankExtent(11, 16, 0.5),
    7: RankExtent(29, 1, 2.0),
}
POOL_ROWS = 31
TOKENS = [1, 3, 63, 64, 65, 100]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def signed(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values of both signs, none of them near zero."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.1 * noise.sign()).to(dtype)


def pools(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors; rows that no extent owns are NaN."""
    a = signed(POOL_ROWS, IN, seed=1, dtype=dtype) / math.sqrt(IN)
    b = signed(POOL_ROWS, OUT, seed=2, dtype=dtype)
    owned = {row for e in EXTENTS.values() for row in range(e.start, e.start + e.rank)}
    unused = [row for row in range(POOL_ROWS) if row not in owned]
    a[unused] = math.nan
    b[unused] = math.nan
    return a, b


def layout(tokens: int) -> list[Segment]:
    """Segments at both ends, all ranks, a slot twice, base rows between them."""
    if tokens == 1:
        return [Segment(0, 1, 1)]
    if tokens == 3:
        return [Segment(0, 1, 7), Segment(2, 3, 2)]
    cuts = [0, 9, 12, 13, 30, 31, 50, tokens - 2, tokens]
    slots = [0, None, 2, 1, None, 7, None, 2]
    return [
        Segment(start, end, slot)
        for (start, end), slot in zip(pairwise(cuts), slots, strict=True)
        if slot is not None
    ]


def resolve(segments: list[Segment], tokens: int, dtype: torch.dtype) -> RankSegments:
    runs = SegmentMap(segments, tokens, dtype=dtype).resolve(EXTENTS)
    assert runs is not None
    return runs


def oracle(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: list[Segment],
    extents: dict[int, RankExtent] = EXTENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The equation one token, rank row and term at a time; and the sum of all terms' sizes."""
    result, size = y.double(), y.double().abs()
    x64, a64, b64 = x.double(), a.double(), b.double()
    for start, end, slot, weight in segments:
        extent = extents[slot]
        for token in range(start, end):
            for row in range(extent.start, extent.start + extent.rank):
                terms = x64[token] * a64[row]
                factor = extent.scaling * weight
                result[token] += factor * math.fsum(terms.tolist()) * b64[row]
                size[token] += abs(factor) * terms.abs().sum() * b64[row].abs()
    return result, size


def assert_close(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Within a few roundings of the terms that were summed."""
    assert not got.isnan().any()
    error = (got.double() - expected).abs()
    limit = 4 * torch.finfo(got.dtype).eps * size
    assert bool((error <= limit).all()), float((error / limit).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_equation(tokens: int, dtype: torch.dtype) -> None:
    segments = layout(tokens)
    runs = resolve(segments, tokens, dtype)
    a, b = pools(dtype)
    x, y = signed(tokens, IN, seed=3, dtype=dtype), signed(tokens, OUT, seed=4, dtype=dtype)
    expected, size = oracle(y, x, a, b, segments)
    before = y.clone()
    lora_delta_(y, x, a, b, runs)
    assert_close(y, expected, size)
    in_segment = torch.zeros(tokens, dtype=torch.bool)
    for segment in segments:
        in_segment[segment.start : segment.end] = True
    assert torch.equal(y[~in_segment], before[~in_segment])
    assert not torch.isclose(y[in_segment], before[in_segment]).all()


@pytest.mark.parametrize("tokens", [64, 65])
@pytest.mark.parametrize("base", [-0.0, math.nan, math.inf])
def test_rows_in_no_segment_keep_their_bits(base: float, tokens: int) -> None:
    segments = layout(tokens)
    a, b = pools(torch.float32)
    x, y = signed(tokens, IN, seed=3), signed(tokens, OUT, seed=4)
    outside = [t for t in range(tokens) if not any(s.start <= t < s.end for s in segments)]
    y[outside] = base
    x[outside] = math.nan
    before = y.clone()
    lora_delta_(y, x, a, b, resolve(segments, tokens, torch.float32))
    assert torch.equal(y[outside].view(torch.int32), before[outside].view(torch.int32))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["a", "b", "both"])
@pytest.mark.parametrize("tokens", [63, 100])
def test_another_adapter_s_poison_reaches_no_token(tokens: int, factor: str, poison: float) -> None:
    segments = layout(tokens)
    runs = resolve(segments, tokens, torch.float32)
    clean_a, clean_b = pools(torch.float32)
    x, y = signed(tokens, IN, seed=3), signed(tokens, OUT, seed=4)
    expected, size = oracle(y, x, clean_a, clean_b, segments)
    for slot in EXTENTS:
        a, b, got = clean_a.clone(), clean_b.clone(), y.clone()
        for other, (start, rank, _) in EXTENTS.items():
            if other != slot:
                if factor in ("a", "both"):
                    a[start : start + rank] = poison
                if factor in ("b", "both"):
                    b[start : start + rank] = poison
        lora_delta_(got, x, a, b, runs)
        for segment in segments:
            rows = slice(segment.start, segment.end)
            if segment.slot == slot:
                assert_close(got[rows], expected[rows], size[rows])
            else:
                assert not got[rows].isfinite().all(), "its own poison must not be hidden"


@pytest.mark.parametrize("tokens", [63, 100], ids=["dense", "loop"])
def test_segments_may_overlap(tokens: int) -> None:
    segments = [
        Segment(0, 20, 0, 0.25),
        Segment(0, 20, 1, -1.5),
        Segment(10, 40, 2, 0.5),
        Segment(35, tokens, 7, 1.0),
        Segment(35, tokens, 0, 3.0),
        Segment(50, 60, 0, 0.5),
    ]
    runs = resolve(segments, tokens, torch.float32)
    a, b = pools(torch.float32)
    x, y = signed(tokens, IN, seed=5), signed(tokens, OUT, seed=6)
    expected, size = oracle(y, x, a, b, segments)
    lora_delta_(y, x, a, b, runs)
    assert_close(y, expected, size)


def test_far_apart_extents_are_looped_over() -> None:
    segments = [Segment(0, 2, 0), Segment(2, 4, 7)]
    runs = resolve(segments, 5, torch.float32)
    a, b = pools(torch.float32)
    x, y = signed(5, IN, seed=7), signed(5, OUT, seed=8)
    expected, size = oracle(y, x, a, b, segments)
    lora_delta_(y, x, a, b, runs)
    assert_close(y, expected, size)


@pytest.mark.parametrize("tokens", [10, 70], ids=["dense", "loop"])
def test_empty_segments_and_zero_weights_change_nothing(tokens: int) -> None:
    segments = [Segment(0, 0, 0), Segment(3, 3, 1), Segment(4, 6, 2, 0.0), Segment(9, 9, 0)]
    a, b = pools(torch.float32)
    x, y = signed(tokens, IN, seed=9), signed(tokens, OUT, seed=10)
    before = y.clone()
    lora_delta_(y, x, a, b, resolve(segments, tokens, torch.float32))
    assert torch.equal(y, before)


def test_writes_only_its_own_rows_of_a_larger_tensor() -> None:
    segments = layout(63)
    a, b = pools(torch.float32)
    wide_x = torch.full((65, IN + 3), math.nan)
    wide_y = torch.full((65, OUT + 5), 7.0)
    x, y = wide_x[1:64, 2 : IN + 2], wide_y[1:64, 3 : OUT + 3]
    x.copy_(signed(63, IN, seed=3))
    y.copy_(signed(63, OUT, seed=4))
    expected, size = oracle(y, x, a, b, segments)
    lora_delta_(y, x, a, b, resolve(segments, 63, torch.float32))
    assert_close(y, expected, size)
    wide_y[1:64, 3 : OUT + 3] = 7.0
    assert torch.equal(wide_y, torch.full((65, OUT + 5), 7.0))


@pytest.mark.parametrize("wrong", ["x rows", "x width", "y width"])
def test_shapes_that_do_not_agree_are_refused(wrong: str) -> None:
    a, b = pools(torch.float32)
    x = torch.zeros(4 if wrong == "x rows" else 3, IN + (wrong == "x width"))
    y = torch.zeros(3, OUT + (wrong == "y width"))
    with pytest.raises(ValueError, match="shapes do not agree"):
        lora_delta_(y, x, a, b, resolve([Segment(0, 2, 0)], 3, torch.float32))


@st.composite
def decode_steps(draw: st.DrawFn) -> tuple[int, list[Segment], dict[int, RankExtent]]:
    """Short segments of adapters of like ranks, as decode steps have them; base rows between."""
    count = draw(st.integers(2, 6))
    slots = draw(st.permutations(range(count)))
    even = draw(st.booleans())
    extents, row = {}, draw(st.integers(0, 3))
    for slot in slots if draw(st.booleans()) else range(count):
        rank = 3 if even else draw(st.integers(2, 4))
        extents[slot] = RankExtent(row, rank, draw(st.sampled_from([0.5, -2.0])))
        row += rank + draw(st.integers(0, 1)) * (not even)
    segments, token = [], draw(st.integers(0, 2))
    for slot in slots:
        length = 2 if even else draw(st.integers(2, 3))
        segments.append(Segment(token, token + length, slot, draw(st.sampled_from([1.0, -0.5]))))
        token += length + draw(st.integers(0, 1)) * (not even)
    return token + draw(st.integers(0, 2)), segments, extents


@given(decode_steps())
@settings(max_examples=200, deadline=None)
def test_grouped_products_equal_the_equation(
    step: tuple[int, list[Segment], dict[int, RankExtent]],
) -> None:
    tokens, segments, extents = step
    runs = SegmentMap(segments, tokens).resolve(extents)
    assert runs is not None
    assert runs.grouped is not None
    rows = max(extent.start + extent.rank for extent in extents.values()) + 1
    a, b = torch.full((rows, IN), math.nan), torch.full((rows, OUT), math.nan)
    for slot, (start, rank, _) in extents.items():
        a[start : start + rank] = signed(rank, IN, seed=20 + slot) / math.sqrt(IN)
        b[start : start + rank] = signed(rank, OUT, seed=40 + slot)
    x, y = signed(tokens, IN, seed=3), signed(tokens, OUT, seed=4)
    before = y.clone()
    expected, size = oracle(y, x, a, b, segments, extents)
    lora_delta_(y, x, a, b, runs)
    assert_close(y, expected, size)
    outside = [t for t in range(tokens) if not any(s.start <= t < s.end for s in segments)]
    assert torch.equal(y[outside], before[outside])
    # Another adapter's infinity stays with its own tokens.
    poisoned = extents[segments[0].slot]
    b[poisoned.start] = math.inf
    got = before.clone()
    lora_delta_(got, x, a, b, runs)
    others = [t for t in range(tokens) if not segments[0].start <= t < segments[0].end]
    assert torch.equal(got[others], y[others])
