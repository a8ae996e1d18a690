"""``SegmentMap`` and ``RankSegments``: what any set of segments resolves to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_kernels import RankExtent, Segment, SegmentMap
from manylora_kernels.segments import GROUPED_MAX_TOKENS

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


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_the_grouped_form_says_the_same_as_the_segments(
    layout: tuple[int, list[Segment], dict[int, RankExtent]],
) -> None:
    tokens, segments, extents = layout
    runs = SegmentMap(segments, tokens).resolve(extents)
    if runs is None or runs.grouped is None:
        return
    grouped = runs.grouped
    count, _, rank = grouped.scales.shape
    places = grouped.tokens.view(count, -1)
    valid = set(range(places.numel())) if grouped.valid is None else set(grouped.valid.tolist())
    for index, (start, end, first, last) in enumerate(runs.segments.tolist()):
        own = [
            places[index, i] for i in range(places.shape[1]) if index * places.shape[1] + i in valid
        ]
        assert own == list(range(start, end))
        scales = grouped.scales[index, 0]
        rows = grouped.rows.view(count, rank)[index]
        assert rows[: last - first].tolist() == list(range(first, last))
        assert (scales[: last - first] == runs.weights[index]).all()
        assert (scales[last - first :] == 0).all()
        if grouped.step:
            assert rows[0] == grouped.rows[0] + index * grouped.step
            assert last - first == rank
    lengths = [end - start for start, end, *_ in runs.segments.tolist()]
    assert places.numel() <= 2 * sum(lengths), "more padding than tokens"
    assert tokens <= GROUPED_MAX_TOKENS


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


def test_one_segment_needs_no_grouping() -> None:
    runs = SegmentMap([Segment(0, 5, 1)], 5).resolve({1: RankExtent(2, 3, 1.0)})
    assert runs is not None
    assert runs.grouped is None


def test_segments_are_grouped_up_to_a_limit() -> None:
    extents = {0: RankExtent(0, 2, 1.0), 1: RankExtent(2, 2, 1.0)}
    for tokens, expected in ((GROUPED_MAX_TOKENS, True), (GROUPED_MAX_TOKENS + 1, False)):
        segments = [Segment(0, tokens // 2, 0), Segment(tokens // 2, tokens, 1)]
        runs = SegmentMap(segments, tokens).resolve(extents)
        assert runs is not None
        assert (runs.grouped is not None) == expected


def test_a_decode_step_is_grouped_without_copies() -> None:
    extents = {slot: RankExtent(16 * slot, 16, 0.5) for slot in range(8)}
    segments = [Segment(2 * slot, 2 * slot + 2, slot) for slot in range(8)]
    runs = SegmentMap(segments, 16).resolve(extents)
    assert runs is not None
    assert runs.grouped is not None
    assert runs.grouped.step == 16
    assert runs.grouped.valid is None
