"""Which tokens of a flattened batch belong to which adapter slot.

The batch builder orders tokens so that each slot's tokens are contiguous; a ``SegmentMap`` lists
those runs. Rows of the base are in no segment. Several segments may cover the same tokens: that is
a weighted mix. A module's ``RankExtent`` per slot says which rank rows of its pools are the slot's,
and ``SegmentMap.resolve`` joins the two into what the kernels take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from manylora_kernels.backends import selected_backend
from manylora_kernels.gpu import TRITON
from manylora_kernels.tile_plan import TilePlan, build, float_bits, upload

# Up to this many tokens (decode, mostly) calls cost more than arithmetic and all segments are
# multiplied in one batch; beyond it each is worth a product of its own (docs/performance.md).
GROUPED_MAX_TOKENS = 64


class Segment(NamedTuple):
    """Tokens ``[start, end)`` use adapter ``slot`` with ``weight`` (1 unless part of a mix)."""

    start: int
    end: int
    slot: int
    weight: float = 1.0


class RankExtent(NamedTuple):
    """Rank rows ``[start, start + rank)`` of a module's pools hold one adapter's factors."""

    start: int
    rank: int
    scaling: float


class Grouped(NamedTuple):
    """The segments of a step as one batch of ``n`` small products, ragged ends padded.

    ``tokens`` int64 ``[n * t]``: each segment's tokens, its last one repeated as padding; ``valid``
    int64: the places in ``tokens`` that are no padding, ``None`` where all are and the segments
    are neighbours. ``rows`` int64 ``[n * r]``: its rank rows, padded by its first; ``scales``
    ``[n, 1, r]``: its weight, 0 for padding. Where ``step`` is not 0, segment ``i`` has exactly
    the rows from ``rows[0] + i * step`` on, so that the pools can be viewed and not copied.
    """

    tokens: torch.Tensor
    valid: torch.Tensor | None
    rows: torch.Tensor
    scales: torch.Tensor
    step: int


class RankSegments:
    """A ``SegmentMap`` resolved for one layout of rank rows.

    ``segments`` is int32 ``[S, 4]``: token start, token end, rank row start, rank row end;
    ``weights`` float32 ``[S]`` is scaling times mix weight; both stay on the CPU. ``grouped`` is
    the same in another form, ``None`` where a loop over the segments is cheaper; it is made when
    it is first asked for. ``plan`` is the same as tables for a GPU's kernels, made likewise.
    """

    def __init__(
        self,
        runs: list[tuple[int, int, int, int, float]],
        num_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.segments = torch.tensor([run[:4] for run in runs], dtype=torch.int32)
        self.weights = torch.tensor([run[4] for run in runs], dtype=torch.float32)
        self._runs = runs
        self._num_tokens = num_tokens
        self._device = device
        self._dtype = dtype

    @cached_property
    def grouped(self) -> Grouped | None:
        """See the class."""
        if len(self._runs) < 2 or self._num_tokens > GROUPED_MAX_TOKENS:
            return None
        return _group(self._runs, self._device, self._dtype)

    @cached_property
    def plan(self) -> TilePlan:
        """See ``tile_plan``. On the device of the step."""
        return build(self._runs, self._device)


def _group(
    runs: list[tuple[int, int, int, int, float]], device: torch.device, dtype: torch.dtype
) -> Grouped | None:
    """Return the grouped form, ``None`` where padding would more than double the work."""
    lengths = [end - start for start, end, *_ in runs]
    ranks = [last - first for _, _, first, last, _ in runs]
    longest, widest, count = max(lengths), max(ranks), len(runs)
    if min(lengths) < 1 or count * longest > 2 * sum(lengths) or count * widest > 2 * sum(ranks):
        return None
    tokens = [min(start + i, end - 1) for start, end, *_ in runs for i in range(longest)]
    rows = [
        first + i if first + i < last else first
        for _, _, first, last, _ in runs
        for i in range(widest)
    ]
    scales = [
        [[weight if i < rank else 0.0 for i in range(widest)]]
        for rank, (*_, weight) in zip(ranks, runs, strict=True)
    ]
    valid = None
    neighbours = all(run[1] == after[0] for run, after in pairwise(runs))
    if not neighbours or min(lengths) < longest:
        places = [k * longest + i for k in range(count) for i in range(lengths[k])]
        valid = torch.tensor(places, device=device)
    steps = {after[2] - run[2] for run, after in pairwise(runs)}
    even = len(steps) == 1 and min(steps) > 0 and min(ranks) == widest
    return Grouped(
        tokens=torch.tensor(tokens, device=device),
        valid=valid,
        rows=torch.tensor(rows, device=device),
        scales=torch.tensor(scales, dtype=dtype, device=device),
        step=steps.pop() if even else 0,
    )


def row_runs(
    segments: Sequence[Segment], rows: Mapping[int, int]
) -> list[tuple[int, int, int, int]]:
    """Return the table of ``scale_shift_``: the segments whose slots are in ``rows``, in order."""
    found = [segment for segment in segments if segment.slot in rows]
    bits = float_bits([segment.weight for segment in found])
    return [
        (segment.start, segment.end, rows[segment.slot], weight)
        for segment, weight in zip(found, bits, strict=True)
    ]


class SegmentMap:
    """The segments of one step, over ``num_tokens`` rows."""

    __slots__ = ("_device", "_dtype", "_resolved", "_rows", "num_tokens", "segments")

    def __init__(
        self,
        segments: Sequence[Segment],
        num_tokens: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.segments = tuple(segments)
        self.num_tokens = num_tokens
        self._device = torch.device(device)
        self._dtype = dtype
        # Most modules of a model share one layout of rank rows, so one resolution serves them all.
        self._resolved: dict[tuple[RankExtent | None, ...], RankSegments | None] = {}
        self._rows: dict[tuple[int | None, ...], torch.Tensor | None] = {}

    def resolve(self, extents: Mapping[int, RankExtent]) -> RankSegments | None:
        """Return the segments in terms of rank rows, ``None`` if no token's slot has any."""
        key = tuple([extents.get(segment.slot) for segment in self.segments])
        if key in self._resolved:
            return self._resolved[key]
        runs = [
            (
                segment.start,
                segment.end,
                extent.start,
                extent.start + extent.rank,
                extent.scaling * segment.weight,
            )
            for segment, extent in zip(self.segments, key, strict=True)
            if extent is not None
        ]
        resolved = RankSegments(runs, self.num_tokens, self._device, self._dtype) if runs else None
        self._resolved[key] = resolved
        return resolved

    def resolve_rows(self, rows: Mapping[int, int]) -> torch.Tensor | None:
        """Return the segments of ``scale_shift_``: those whose slots are in ``rows``.

        Where the selected backend wants them; ``None`` if there are none.
        """
        key = tuple([rows.get(segment.slot) for segment in self.segments])
        if key not in self._rows:
            found = row_runs(self.segments, rows)
            table = None
            if found and selected_backend("scale_shift_") == TRITON:
                table = upload(found, self._device)
            elif found:
                table = torch.tensor(found, dtype=torch.int32)
            self._rows[key] = table
        return self._rows[key]
