"""What a CUDA graph reads of its step's adapters: tables at fixed addresses, filled before it.

A graph is captured once for any mix of adapters. Modules whose pools have one layout of rank rows
share a table of ``manylora_kernels.tile_plan``, padded to what the batch can need; likewise those
with one layout of affine rows. A table is worked out from the step's segments and any one of its
modules, so a step costs as much as there are layouts, not modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch

from manylora_kernels import RankExtent, Segment, SegmentMap
from manylora_kernels.segments import RankSegments, row_runs
from manylora_kernels.tile_plan import COLUMNS, ITEM_RANKS, TilePlan, cut
from manylora_server.model.adapted import (
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedModule,
    AdaptedNorm,
)
from manylora_server.model.graph_inputs import put
from manylora_server.model.rank_pool import AffinePool

# A slot that nobody has: modules ask whether a step has segments at all.
_NOBODY = -1

T = TypeVar("T")


def blocked_slots(modules: Collection[AdaptedModule]) -> set[int]:
    """Return the slots whose adapters a graph cannot compute.

    Those that replace modules, shift norms or change embeddings: these are loops over segments.
    """
    blocked: set[int] = set()
    for module in modules:
        blocked.update(module.replacements)
        if isinstance(module, AdaptedEmbedding):
            blocked.update(module.low_rank)
        elif isinstance(module, AdaptedNorm):
            blocked.update(module.shifts)
    return blocked


class StaticRuns(RankSegments):
    """A group's segments, of which only the tables count."""

    def __init__(self, plan: TilePlan, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__([], 0, device, dtype)
        self.plan = plan


class StaticSegments(SegmentMap):
    """Gives every module its group's tables, whatever the step."""

    __slots__ = ("_rows_by_id", "_runs_by_id")

    def __init__(
        self,
        batch: int,
        runs: Mapping[int, RankSegments],
        rows: Mapping[int, torch.Tensor],
        device: torch.device,
    ) -> None:
        super().__init__([Segment(0, batch, _NOBODY)], batch, device=device)
        self._runs_by_id = runs
        self._rows_by_id = rows

    def resolve(self, extents: Mapping[int, RankExtent]) -> RankSegments | None:
        """Return the tables of the pool that ``extents`` belongs to."""
        return self._runs_by_id[id(extents)]

    def resolve_rows(self, rows: Mapping[int, int]) -> torch.Tensor | None:
        """Return the table of the affine pool that ``rows`` belongs to."""
        return self._rows_by_id[id(rows)]


class AdapterTables:
    """The tables of one graph over ``modules`` as they are now, for up to ``batch`` tokens.

    A token may have ``depth`` adapters at the most.
    """

    def __init__(
        self,
        modules: Collection[AdaptedModule],
        batch: int,
        depth: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._addresses = _addresses(modules)
        self._ranks = _group([m.ranks.extents for m in modules if isinstance(m, AdaptedLinear)])
        self._affine = _group([pool.rows for pool in _affine_pools(modules)])
        # Each token may be other adapters', of the largest rank there is.
        self._items = [
            batch * depth * -(-max(extent.rank for extent in group[0].values()) // ITEM_RANKS)
            for group in self._ranks
        ]
        self._batch = batch
        self._most_rows = batch * depth
        self._plans = torch.zeros(
            sum(self._items) + batch * len(self._items), COLUMNS, dtype=torch.int32, device=device
        )
        self._rows = torch.zeros(
            len(self._affine), self._most_rows, 4, dtype=torch.int32, device=device
        )
        runs: dict[int, RankSegments] = {}
        start = 0
        for group, items in zip(self._ranks, self._items, strict=True):
            cells = start + items
            plan = TilePlan(self._plans[start:cells], self._plans[cells : cells + batch])
            static = StaticRuns(plan, device, dtype)
            runs |= {id(extents): static for extents in group}
            start = cells + batch
        rows = {
            id(pool): table
            for group_rows, table in zip(self._affine, self._rows, strict=True)
            for pool in group_rows
        }
        self.segments = StaticSegments(batch, runs, rows, device)

    def hold(self, modules: Collection[AdaptedModule]) -> bool:
        """Whether a graph over these tables still computes ``modules``.

        Not once one was wrapped or its memory has moved, nor once modules of one group have
        different layouts.
        """
        groups: list[list[dict[int, RankExtent]]] | list[list[dict[int, int]]]
        for groups in (self._ranks, self._affine):
            for group in groups:
                if any(other != group[0] for other in group[1:]):
                    return False
        return self._addresses == _addresses(modules)

    def fill(self, segments: Sequence[Segment]) -> bool:
        """Write the tables of a step; false, and nothing is written, where they do not fit."""
        plans: list[Sequence[int]] = []
        nothing = (0,) * COLUMNS
        for group, capacity in zip(self._ranks, self._items, strict=True):
            extents = group[0]
            runs = [
                (start, end, e.start, e.start + e.rank, e.scaling * weight)
                for start, end, slot, weight in segments
                for e in [extents.get(slot)]
                if e is not None
            ]
            items, cells = cut(runs)
            if len(items) > capacity or len(cells) > self._batch:
                return False
            plans += items
            plans += [nothing] * (capacity - len(items))
            plans += cells
            plans += [nothing] * (self._batch - len(cells))
        affine = []
        for rows in (group_rows[0] for group_rows in self._affine):
            found = row_runs(segments, rows)
            if len(found) > self._most_rows:
                return False
            affine.append([*found, *[(0, 0, 0, 0)] * (self._most_rows - len(found))])
        if plans:
            put(self._plans, plans)
        if affine:
            put(self._rows, affine)
        return True


def _affine_pools(modules: Collection[AdaptedModule]) -> list[AffinePool]:
    return [m.affine for m in modules if isinstance(m, (AdaptedLinear, AdaptedEmbedding))]


def _addresses(modules: Collection[AdaptedModule]) -> list[int]:
    """Return where everything is that a graph over ``modules`` would read."""
    found = []
    for module in modules:
        found.append(id(module))
        if isinstance(module, AdaptedLinear):
            found += [module.ranks.a.data_ptr(), module.ranks.b.data_ptr()]
    for pool in _affine_pools(modules):
        found += [pool.scale.data_ptr(), pool.shift.data_ptr()]
    return found


def _group(layouts: Sequence[dict[int, T]]) -> list[list[dict[int, T]]]:
    """Return the non-empty ``layouts`` themselves, equal ones together."""
    groups: list[list[dict[int, T]]] = []
    for layout in layouts:
        if not layout:
            continue
        for group in groups:
            if group[0] == layout:
                group.append(layout)
                break
        else:
            groups.append([layout])
    return groups
