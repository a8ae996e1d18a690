"""What the resident adapters do at each hook of a program, as tables that native code reads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from manylora_kernels import RankExtent, SegmentMap
from manylora_kernels.native.lora import FACTOR_TYPES
from manylora_kernels.native.program import Hook, LoraRuns, RescaleRuns
from manylora_server.model.adapted import AdaptedLinear, AdaptedModule
from manylora_server.model.modules import AdaptedModules


@dataclass(frozen=True, slots=True)
class HookPlace:
    """A module's hook; whether its rows are the outputs', and native instructions compute it."""

    module: str
    is_output_head: bool
    is_native: bool


@dataclass(slots=True)
class _Layout:
    """Hooks whose pools are laid out alike share their runs."""

    is_output_head: bool
    extents: dict[int, RankExtent] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)


class HookTable:
    """Keeps the tables up to date: pools between steps, runs for each step.

    ``called`` lists, for the step that was set last, the hooks whose module torch must compute:
    replaced modules, embeddings, norms, and hooks without native instructions.
    """

    def __init__(self, hooks: Sequence[HookPlace]) -> None:
        self._places = tuple(hooks)
        self._hooks = (Hook * max(1, len(hooks)))()
        self._modules: list[AdaptedModule | None] = [None] * len(hooks)
        self._layouts: list[_Layout] = []
        self._lora = (LoraRuns * 1)()
        self._rescale = (RescaleRuns * 1)()
        self._version = -1
        self._segments: tuple[SegmentMap, SegmentMap] | None = None
        self._kept: list[object] = []
        self.called: tuple[int, ...] = ()
        self._clear()

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where the hooks, the low-rank runs and the rescaling runs lie."""
        return (
            ctypes.addressof(self._hooks),
            ctypes.addressof(self._lora),
            ctypes.addressof(self._rescale),
        )

    def module(self, hook: int) -> AdaptedModule:
        """Return the module whose rows are to be computed at ``hook``."""
        module = self._modules[hook]
        assert module is not None
        return module

    def set(
        self, adapters: AdaptedModules | None, segments: SegmentMap, outputs: SegmentMap
    ) -> None:
        """Prepare a step over ``segments`` of all rows and ``outputs`` of those with logits."""
        version = -1 if adapters is None else adapters.version
        if version != self._version:
            self._read(adapters)
            self._version = version
        elif self._segments is not None and _same(self._segments, (segments, outputs)):
            return
        self._segments = (segments, outputs)
        self._kept = []
        for number, layout in enumerate(self._layouts):
            rows = outputs if layout.is_output_head else segments
            if layout.extents:
                self._set_runs(number, rows, layout.extents)
            else:
                self._set_rows(number, rows, layout.rows)
        used = {segment.slot for segment in segments.segments}
        self.called = tuple(
            index
            for index, module in enumerate(self._modules)
            if module is not None
            and used & module.slots
            and not (self._places[index].is_native and _is_native(module, used))
        )

    def _clear(self) -> None:
        for hook in self._hooks:
            hook.rescale = -1
            for pool in hook.pools:
                pool.runs = -1

    def _read(self, adapters: AdaptedModules | None) -> None:
        """Read all modules' pools anew."""
        self._clear()
        self._layouts = []
        self._modules = [None] * len(self._places)
        numbers: dict[tuple[object, ...], int] = {}

        def number_of(head: bool, extents: dict[int, RankExtent], rows: dict[int, int]) -> int:
            key = (head, tuple(sorted(extents.items())), tuple(sorted(rows.items())))
            if key not in numbers:
                numbers[key] = len(self._layouts)
                self._layouts.append(_Layout(head, dict(extents), dict(rows)))
            return numbers[key]

        for index, place in enumerate(self._places):
            module = None if adapters is None else adapters.find(place.module)
            if module is None or not module.slots:
                continue
            self._modules[index] = module
            if not isinstance(module, AdaptedLinear) or not place.is_native:
                continue
            hook = self._hooks[index]
            head = place.is_output_head
            for ranks in module.rank_pools:
                if ranks.extents:
                    pool = hook.pools[FACTOR_TYPES.index(ranks.a.dtype)]
                    pool.a, pool.b = ranks.a.data_ptr(), ranks.b.data_ptr()
                    pool.runs = number_of(head, ranks.extents, {})
            if module.affine.rows:
                hook.scale = module.affine.scale.data_ptr()
                hook.shift = module.affine.shift.data_ptr()
                hook.rescale = number_of(head, {}, module.affine.rows)
        count = max(1, len(self._layouts))
        self._lora = (LoraRuns * count)()
        self._rescale = (RescaleRuns * count)()
        self._segments = None

    def _set_runs(self, number: int, rows: SegmentMap, extents: dict[int, RankExtent]) -> None:
        runs = rows.resolve(extents)
        entry = self._lora[number]
        entry.count = 0
        if runs is not None:
            self._kept.append(runs)
            entry.runs, entry.weights = runs.segments.data_ptr(), runs.weights.data_ptr()
            entry.count = runs.segments.shape[0]

    def _set_rows(self, number: int, rows: SegmentMap, by_slot: dict[int, int]) -> None:
        runs = rows.resolve_rows(by_slot)
        entry = self._rescale[number]
        entry.count = 0
        if runs is not None:
            self._kept.append(runs)
            entry.runs, entry.count = runs.data_ptr(), runs.shape[0]


def _is_native(module: AdaptedModule, used: set[int]) -> bool:
    return isinstance(module, AdaptedLinear) and used.isdisjoint(module.replacements)


def _same(before: tuple[SegmentMap, SegmentMap], now: tuple[SegmentMap, SegmentMap]) -> bool:
    return all(a.segments == b.segments for a, b in zip(before, now, strict=True))
