"""Per-module device memory for adapters: rank rows for low-rank factors, rows for affine maps."""

from __future__ import annotations

import torch

from manylora_kernels import RankExtent, SegmentMap, scale_shift_
from manylora_store.compiler.canonical import LowRank


class RankPool:
    """All resident adapters' factors of one linear module, rank row by rank row.

    ``a [rows, in]`` and ``b [rows, out]``; a slot owns the rows of its extent and no others, so
    an adapter of rank 4 takes four rows, whatever its neighbours' ranks. Growing and shrinking
    move rows; extents are the only references to them, and change only between steps.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.a = torch.empty(0, in_features, dtype=dtype, device=device)
        self.b = torch.empty(0, out_features, dtype=dtype, device=device)
        self.extents: dict[int, RankExtent] = {}

    def reserve(self, slot: int, factors: LowRank) -> None:
        """Give ``slot`` rows for ``factors``. May move the pools, so it belongs between steps."""
        assert slot not in self.extents, "the slot's previous factors must be removed first"
        start = self._fit(factors.rank)
        self.extents[slot] = RankExtent(start, factors.rank, factors.scaling)

    def fill(self, slot: int, factors: LowRank) -> None:
        """Copy ``factors`` into the rows reserved for ``slot``; reads and writes no others."""
        extent = self.extents[slot]
        rows = slice(extent.start, extent.start + extent.rank)
        self.a[rows].copy_(factors.a, non_blocking=True)
        self.b[rows].copy_(factors.b, non_blocking=True)

    def remove(self, slot: int) -> None:
        """Give ``slot``'s rows back; memory is returned once three quarters of it is unused."""
        if self.extents.pop(slot, None) is None:
            return
        used = self._used()
        if 4 * used <= self.a.shape[0]:
            self._reallocate(used)

    def _used(self) -> int:
        return sum(extent.rank for extent in self.extents.values())

    def _fit(self, rank: int) -> int:
        """Return the first row of a gap of ``rank`` rows, made if there is none."""
        row = 0
        for extent in sorted(self.extents.values()):
            if extent.start - row >= rank:
                return row
            row = extent.start + extent.rank
        if self.a.shape[0] - row < rank:
            used = self._used()
            self._reallocate(max(used + rank, used + used // 2))
            row = used
        return row

    def _reallocate(self, rows: int) -> None:
        """Move all extents, gaps closed, into new pools of ``rows`` rows."""
        a = self.a.new_empty(rows, self.a.shape[1])
        b = self.b.new_empty(rows, self.b.shape[1])
        row = 0
        for slot, extent in sorted(self.extents.items(), key=lambda item: item[1]):
            source = slice(extent.start, extent.start + extent.rank)
            target = slice(row, row + extent.rank)
            a[target].copy_(self.a[source])
            b[target].copy_(self.b[source])
            self.extents[slot] = extent._replace(start=row)
            row += extent.rank
        self.a, self.b = a, b


class AffinePool:
    """Resident adapters' output scales and shifts of one module: ``scale``, ``shift [rows, out]``.

    A missing scale is 1, a missing shift 0.
    """

    def __init__(self, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.scale = torch.empty(0, out_features, dtype=dtype, device=device)
        self.shift = torch.empty(0, out_features, dtype=dtype, device=device)
        self.rows: dict[int, int] = {}

    def reserve(self, slot: int) -> None:
        """Give ``slot`` a row. May move the pools, so it belongs between steps."""
        assert slot not in self.rows, "the slot's previous map must be removed first"
        free = set(range(self.scale.shape[0])) - set(self.rows.values())
        if free:
            row = min(free)
        else:
            row = self.scale.shape[0]
            self.scale = torch.cat((self.scale, self.scale.new_empty(1, self.scale.shape[1])))
            self.shift = torch.cat((self.shift, self.shift.new_empty(1, self.shift.shape[1])))
        self.rows[slot] = row

    def fill(self, slot: int, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
        """Store the map of ``slot``, whose row is reserved."""
        row = self.rows[slot]
        for pool, given, neutral in ((self.scale, scale, 1.0), (self.shift, shift, 0.0)):
            if given is None:
                pool[row] = neutral
            else:
                pool[row].copy_(given, non_blocking=True)

    def apply(self, y: torch.Tensor, segments: SegmentMap) -> None:
        """Scale and shift the rows of ``y [T, out]`` whose slots have a map, in place."""
        table = segments.resolve_rows(self.rows) if self.rows else None
        if table is not None:
            scale_shift_(y, self.scale, self.shift, table)

    def remove(self, slot: int) -> None:
        """Give ``slot``'s row back; the memory when it was the last."""
        if self.rows.pop(slot, None) is not None and not self.rows:
            self.scale = self.scale.new_empty(0, self.scale.shape[1])
            self.shift = self.shift.new_empty(0, self.shift.shape[1])
