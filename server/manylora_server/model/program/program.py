"""A model's forward pass as one list of native instructions, for steps of any size.

What CUDA graphs are for a GPU: the pass is recorded from transformers' own code once, at load, and
replayed without its Python. Unlike a graph, a program fits any number of tokens, and adapters may
come and go: what they do enters through hooks, whose tables are refreshed for each step.
``docs/decisions/0014`` says how and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from manylora_kernels import SegmentMap
from manylora_kernels.native.program import Code, Instruction, NativeProgram, Step
from manylora_server.model.attention import PagedAttention
from manylora_server.model.context import ForwardContext, forward_context
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.program.affine import SAMPLES
from manylora_server.model.program.arena import Arena, ArenaPlan, plan_arena
from manylora_server.model.program.foreign import BoundCall, View, bind_call
from manylora_server.model.program.hooks import HookPlace, HookTable
from manylora_server.model.program.lowering import Lowering
from manylora_server.model.program.operands import NotNativeError
from manylora_server.model.program.pages import PageTable
from manylora_server.model.program.recorder import record
from manylora_server.model.program.schedule import gather_products
from manylora_server.model.program.symbolic import (
    SymbolicEvent,
    SymbolicRecording,
    SymbolicRef,
    unify,
)
from manylora_server.model.program.variant import exchanged

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Step sizes whose memory is laid out and kept; each takes a view for every tensor torch touches.
_REMEMBERED = 256


@dataclass(slots=True)
class _Layout:
    """The program's memory for one step size."""

    slots: Any
    view: View
    views: dict[str, torch.Tensor]
    calls: dict[int, BoundCall]
    attention: dict[int, tuple[tuple[torch.Tensor, ...], torch.Tensor]]


class StepProgram:
    """See the module docstring. Not for use by two threads at once."""

    def __init__(self, recording: SymbolicRecording, head: str | None) -> None:
        self.adapters: AdaptedModules | None = None
        self._recording = recording
        self._plan: ArenaPlan = plan_arena(recording)
        self._arena = Arena()
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._laid_at = 0
        self._lowering = Lowering(self._plan)
        self._instructions: list[Instruction] = []
        # By instruction: what torch computes always, and the hooks that it may have to.
        self._foreign: dict[int, SymbolicEvent] = {}
        self._hook_at: list[int] = []
        # By event: its first instruction, and how many there are.
        self._spans: list[tuple[int, int]] = []
        self._layers: list[int] = []
        places: list[HookPlace] = []
        hook_events: list[SymbolicEvent] = []
        for event in recording.events:
            start = len(self._instructions)
            if event.kind == "module":
                places.append(self._add_hook(event, len(places), head))
                hook_events.append(event)
            else:
                self._add(event)
            self._spans.append((start, len(self._instructions) - start))
        self._hook_events = tuple(hook_events)
        self._table = HookTable(places)
        self._pages = PageTable(self._layers)
        self._places = tuple(places)
        self._native = NativeProgram(self._instructions)

    @property
    def foreign_calls(self) -> tuple[str, ...]:
        """What torch computes in every step, in order."""
        return tuple(str(event.target) for event in self._foreign.values())

    @property
    def instructions(self) -> int:
        """How many instructions a pass has."""
        return len(self._instructions)

    def variant(self, modules: Mapping[str, nn.Module], memory: Arena | None = None) -> StepProgram:
        """Return a program for the same pass with ``modules`` in place of the base's, by name.

        It has tables of its own and no adapters. Its memory is this one's if none is given; it must
        not be where the two are run in turns before either is done.
        """
        other = copy.copy(self)
        other.adapters = None
        other._instructions = [*self._instructions]
        other._foreign = {**self._foreign}
        other._lowering = Lowering(self._plan)
        for index, event in exchanged(self._recording.events, modules).items():
            other._exchange(index, event)
        other._foreign = dict(sorted(other._foreign.items()))
        if modules:
            other._native = NativeProgram(other._instructions)
        other._layouts = {}
        other._table = HookTable(self._places)
        other._pages = PageTable(self._layers)
        if memory is not None:
            other._arena = memory
        return other

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: PagedAttention,
        segments: SegmentMap,
        output_segments: SegmentMap,
    ) -> torch.Tensor:
        """Return logits ``[n, vocab]``: memory of the program, which the next run overwrites.

        ``ids`` and ``positions`` int64 ``[T]``; ``rows`` int64 ``[n]``: those with logits.
        """
        pieces = self.in_pieces(ids, positions, rows, attention, segments, output_segments)
        try:
            while True:
                next(pieces)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits

    def in_pieces(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: PagedAttention,
        segments: SegmentMap,
        output_segments: SegmentMap,
        most: int = 1 << 30,
    ) -> Generator[None, None, torch.Tensor]:
        """Do what ``run`` does, and yield after every ``most`` instructions at the latest.

        Meanwhile adapters may come and go, but not those of ``segments``.
        """
        tokens, outputs = ids.shape[0], rows.shape[0]
        layout = self._layout(tokens, outputs)
        for name, given in (("ids", ids), ("positions", positions), ("rows", rows)):
            layout.views[name].view(-1).copy_(given)
        pages = self._pages.pages(attention)
        end = len(self._instructions)
        place = 0
        while place < end:
            self._table.set(self.adapters, segments, output_segments)
            hooks, lora, rescale = self._table.addresses
            step = Step(tokens, outputs, layout.slots.ctypes.data, hooks, lora, rescale, pages)
            called = {self._hook_at[hook]: hook for hook in self._table.called}
            stops = sorted((*self._foreign, *called)) if called else list(self._foreign)
            until = min(end, place + most)
            for stop in stops:
                if not place <= stop < until:
                    continue
                if stop > place:
                    self._native.run(step, place, stop)
                place = stop + 1
                if stop in called:
                    place = self._call_hook(
                        called[stop], layout, segments, output_segments, attention
                    )
                elif stop in layout.attention:
                    self._attend(stop, layout, attention)
                else:
                    layout.calls[stop]()
            if place < until:
                self._native.run(step, place, until)
                place = until
            if place < end:
                yield
        return layout.views["logits"]

    def _exchange(self, index: int, event: SymbolicEvent) -> None:
        """Let ``event`` be computed where the recording's event ``index`` is."""
        start, count = self._spans[index]
        replaced = self._recording.events[index]
        instruction = Instruction(code=Code.FOREIGN)
        self._foreign[start] = event
        if replaced.kind == "operator":
            assert count == 1
            try:
                (instruction,) = self._lowering.instructions(event)
            except NotNativeError:
                pass
            else:
                del self._foreign[start]
        # A module's first instruction is the place where torch takes over.
        self._instructions[start] = instruction

    def _add(self, event: SymbolicEvent) -> None:
        try:
            if event.kind == "operator":
                self._instructions.extend(self._lowering.instructions(event))
            else:
                number = len(self._layers)
                self._instructions.append(self._lowering.attention(event, number))
                self._layers.append(event.target)
            return
        except NotNativeError:
            pass
        self._foreign[len(self._instructions)] = event
        self._instructions.append(Instruction(code=Code.FOREIGN))

    def _add_hook(self, event: SymbolicEvent, hook: int, head: str | None) -> HookPlace:
        """Add a hook: the place where torch may take over, then its native instructions, if any."""
        (x,), (y,) = event.args, event.outs
        self._hook_at.append(len(self._instructions))
        self._instructions.append(Instruction(code=Code.FOREIGN))
        try:
            native = [self._lowering.rows(code, hook, x, y) for code in (Code.LORA, Code.RESCALE)]
        except NotNativeError:
            native = []
        self._instructions.extend(native)
        return HookPlace(event.target, event.target == head, bool(native))

    def _call_hook(
        self,
        hook: int,
        layout: _Layout,
        segments: SegmentMap,
        output_segments: SegmentMap,
        attention: PagedAttention,
    ) -> int:
        """Let torch apply the patches of one module; return the next instruction."""
        place = self._places[hook]
        event = self._hook_events[hook]
        x, y = layout.view(event.args[0]), layout.view(event.outs[0])
        rows = output_segments if place.is_output_head else segments
        if rows.segments:
            with forward_context(ForwardContext(attention, segments, output_segments)):
                patched = self._table.module(hook).patch_rows(x, y, rows)
            if patched.data_ptr() != y.data_ptr():
                y.copy_(patched)
        return self._hook_at[hook] + (3 if place.is_native else 1)

    def _attend(self, stop: int, layout: _Layout, attention: PagedAttention) -> None:
        event = self._foreign[stop]
        (query, key, value), out = layout.attention[stop]
        settings = event.kwargs
        sinks = settings["sinks"]
        result = attention.attend(
            event.target,
            query,
            key,
            value,
            settings["scaling"],
            settings["window"],
            settings["softcap"],
            None if sinks is None else sinks.tensor,
        )
        out.copy_(result)

    def _layout(self, tokens: int, outputs: int) -> _Layout:
        # Whatever was laid out before the arena grew points into the old one, and keeps it.
        if self._laid_at != self._arena.address:
            self._layouts.clear()
        found = self._layouts.get((tokens, outputs))
        if found is not None:
            return found
        places, size = self._plan.addresses(tokens, outputs)
        if self._arena.reserve(size) or len(self._layouts) >= _REMEMBERED:
            self._layouts.clear()
        self._laid_at = self._arena.address
        layout = self._lay_out(places, tokens, outputs)
        self._layouts[tokens, outputs] = layout
        return layout

    def _lay_out(self, places: list[int], tokens: int, outputs: int) -> _Layout:
        base = self._arena.address
        slots = torch.tensor([base + place for place in places], dtype=torch.int64).numpy()

        def view(ref: SymbolicRef) -> torch.Tensor:
            start = places[self._plan.slot_of[ref.buffer]]
            size = [n.at(tokens, outputs) for n in ref.size]
            stride = [n.at(tokens, outputs) for n in ref.stride]
            whole = self._arena.since(start).view(ref.dtype)
            return whole.as_strided(
                size, stride, whole.storage_offset() + ref.offset.at(tokens, outputs)
            )

        recording = self._recording
        views = {name: view(ref) for name, ref in recording.inputs.items()}
        views["logits"] = view(recording.output)
        calls: dict[int, BoundCall] = {}
        attention: dict[int, tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}
        for stop, event in self._foreign.items():
            if event.kind == "attention":
                attention[stop] = (tuple(map(view, event.args)), view(event.outs[0]))
            else:
                calls[stop] = bind_call(event, tokens, outputs, view)
        return _Layout(slots, view, views, calls, attention)


def record_program(
    model: nn.Module,
    forward: Forward,
    modules: dict[str, nn.Module],
    head: str | None,
) -> StepProgram:
    """Record ``forward``; ``NotRecordableError`` says why a model's pass cannot be replayed.

    ``modules`` are those that adapters may change, by name; ``head`` is the output head's name.
    """
    with _no_padding_token(model):
        recordings = [record(forward, modules, *sample) for sample in SAMPLES]
    return StepProgram(gather_products(unify(recordings)), head)


@contextmanager
def _no_padding_token(model: nn.Module) -> Iterator[None]:
    """Keep transformers from looking for padding among the ids, to warn of a missing mask."""
    config: Any = model.config
    before = getattr(config, "pad_token_id", None)
    config.pad_token_id = None
    try:
        yield
    finally:
        config.pad_token_id = before
