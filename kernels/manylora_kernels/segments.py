"""Which tokens of a flattened batch belong to which adapter slot.

The batch builder orders tokens so that each slot's tokens are contiguous; a ``SegmentMap`` lists
those runs. Rows of the base are in no segment. Several segments may cover the same tokens: that is
a weighted mix. A module's ``RankExtent`` per slot says which rank rows of its pools are the slot's,
and ``SegmentMap.resolve`` joins the two into what the kernels take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

# Above this many tokens the masked product of the dense form wastes more arithmetic than the loop
# over segments costs in calls (docs/performance.md, "Segmented LoRA in plain PyTorch").
DENSE_FORM_MAX_TOKENS = 64


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


class RankSegments:
    """A ``SegmentMap`` resolved for one layout of rank rows.

    ``segments`` is int32 ``[S, 4]``: token start, token end, rank row start, rank row end;
    ``weights`` float32 ``[S]`` is scaling times mix weight; both stay on the CPU. ``gate`` is the
    same as a dense matrix ``[num_tokens, rows]`` over rank rows ``[first_row, first_row + rows)``:
    the weight where the rank row belongs to the token's adapter, else 0; ``None`` where the loop
    is cheaper. ``spans`` are the starts and ends, alternating, of the token runs in any segment.
    """

    __slots__ = ("first_row", "gate", "segments", "spans", "weights")

    def __init__(
        self,
        runs: list[tuple[int, int, int, int, float]],
        num_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.segments = torch.tensor([run[:4] for run in runs], dtype=torch.int32)
        self.weights = torch.tensor([run[4] for run in runs], dtype=torch.float32)
        self.first_row = min(run[2] for run in runs)
        rows = max(run[3] for run in runs) - self.first_row
        used = sum({run[2]: run[3] - run[2] for run in runs}.values())
        covers_all = len(runs) == 1 and runs[0][1] - runs[0][0] == num_tokens
        self.spans = _spans(runs)
        self.gate: torch.Tensor | None = None
        if num_tokens <= DENSE_FORM_MAX_TOKENS and rows <= 2 * used and not covers_all:
            gate = torch.zeros(num_tokens, rows, dtype=dtype)
            for start, end, row_start, row_end, weight in runs:
                gate[start:end, row_start - self.first_row : row_end - self.first_row] += weight
            self.gate = gate.to(device)


def _spans(runs: Sequence[tuple[int, int, int, int, float]]) -> list[int]:
    spans: list[int] = []
    for start, end, *_ in sorted(runs):
        if spans and start <= spans[-1]:
            spans[-1] = max(end, spans[-1])
        else:
            spans += (start, end)
    return spans


class SegmentMap:
    """The segments of one step, over ``num_tokens`` rows."""

    __slots__ = ("_device", "_dtype", "_resolved", "num_tokens", "segments")

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
