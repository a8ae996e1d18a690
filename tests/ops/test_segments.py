"""``SegmentMap`` and ``RankSegments``: what any set of segments resolves to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_kernels import RankExtent, Segment, SegmentMap
from manylora_kernels.segments import DENSE_FORM_MAX_TOKENS

WEIGHTS = st.sampled_from([1.0, -1.0, 0.5, 2.0, 0.0])


@st.composite
def layouts(
    draw: st.DrawFn, most_tokens: int = 80
) -> tuple[int, list[Segment], dict[int, RankExtent]]:
    """Any segments over some tokens, and disjoint extents for some of their slots."""
    tokens = draw(st.integers(1, most_tokens))
    segments = []
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, tokens))
        end = draw(st.integers(start, tokens))
        segments.append(Segment(start, end, draw(st.integers(0, 4)), draw(WEIGHTS)))
    extents = {}
    row = 0
    for slot in draw(st.permutations(range(5)))[: draw(st.integers(0, 5))]:
        row += draw(st.integers(0, 4))
        rank = draw(st.integers(1, 9))
        extents[slot] = RankExtent(row, rank, draw(st.sampled_from([0.5, -2.0, 1.0])))
        row += rank
    return tokens, segments, extents


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_resolves_to_the_segments_whose_slots_have_rows(
    layout: tuple[int, list[Segment], dict[int, RankExtent]],
) -> None:
    tokens, segments, extents = layout
    expected = [
        (s.start, s.end, extents[s.slot].start, extents[s.slot].start + extents[s.slot].rank)
        for s in segments
        if s.slot in extents
    ]
    runs = SegmentMap(segments, tokens).resolve(extents)
    if runs is None:
        assert expected == []
        return
    assert [tuple(run) for run in runs.segments.tolist()] == expected
    weights = [s.weight * extents[s.slot].scaling for s in segments if s.slot in extents]
    assert runs.weights.tolist() == weights
    assert runs.segments.dtype == torch.int32
    assert runs.first_row == min(run[2] for run in expected)


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_the_gate_is_the_same_as_the_segments(
    layout: tuple[int, list[Segment], dict[int, RankExtent]],
) -> None:
    tokens, segments, extents = layout
    runs = SegmentMap(segments, tokens).resolve(extents)
    if runs is None or runs.gate is None:
        return
    used = [extents[s.slot] for s in segments if s.slot in extents]
    last = max(extent.start + extent.rank for extent in used)
    expected = torch.zeros(tokens, last - runs.first_row)
    for token in range(tokens):
        for segment in segments:
            extent = extents.get(segment.slot)
            if extent is not None and segment.start <= token < segment.end:
                for rank in range(extent.rank):
                    column = extent.start + rank - runs.first_row
                    expected[token, column] += segment.weight * extent.scaling
    assert torch.equal(runs.gate, expected)
    assert tokens <= DENSE_FORM_MAX_TOKENS
    assert runs.gate.shape[1] <= 2 * sum(extent.rank for extent in set(used))


def test_one_layout_of_rank_rows_is_resolved_once() -> None:
    plan = SegmentMap([Segment(0, 1, 3), Segment(1, 4, 5)], 5)
    extents = {3: RankExtent(0, 2, 1.0), 5: RankExtent(2, 4, 1.0)}
    first = plan.resolve(extents)
    # A slot that is in no segment of this step does not matter.
    assert plan.resolve({**extents, 9: RankExtent(6, 1, 1.0)}) is first
    assert plan.resolve({**extents, 5: RankExtent(3, 4, 1.0)}) is not first
    assert plan.resolve({**extents, 5: RankExtent(2, 4, 2.0)}) is not first
    only = plan.resolve({5: extents[5]})
    assert only is not None
    assert only.segments.tolist() == [[1, 4, 2, 6]]


def test_no_rows_and_no_segments_resolve_to_none() -> None:
    assert SegmentMap([], 5).resolve({0: RankExtent(0, 2, 1.0)}) is None
    assert SegmentMap([Segment(0, 5, 1)], 5).resolve({}) is None


def test_one_adapter_for_all_tokens_needs_no_gate() -> None:
    runs = SegmentMap([Segment(0, 5, 1)], 5).resolve({1: RankExtent(2, 3, 1.0)})
    assert runs is not None
    assert runs.gate is None


def test_the_gate_is_dense_up_to_its_limit() -> None:
    extents = {0: RankExtent(0, 2, 1.0), 1: RankExtent(2, 2, 1.0)}
    for tokens, dense in ((DENSE_FORM_MAX_TOKENS, True), (DENSE_FORM_MAX_TOKENS + 1, False)):
        segments = [Segment(0, 1, 0), Segment(1, tokens, 1)]
        runs = SegmentMap(segments, tokens).resolve(extents)
        assert runs is not None
        assert (runs.gate is not None) == dense
