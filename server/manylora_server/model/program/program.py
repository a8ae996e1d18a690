"""A model's forward pass as one list of native instructions, for steps of any size.

What CUDA graphs are for a GPU: the pass is recorded from transformers' own code once, at load, and
replayed without its Python. Unlike a graph, a program fits any number of tokens, and adapters may
come and go: what they do enters through hooks, whose tables are refreshed for each step.
``docs/decisions/0014`` says how and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from manylora_server.model.program.arena import ArenaPlan, plan_arena
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
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._lowering = Lowering(self._plan)
        self._instructions: list[Instruction] = []
        # By instruction: what torch computes always, and the hooks that it may have to.
        self._foreign: dict[int, SymbolicEvent] = {}
        self._hook_at: list[int] = []
        self._pages = PageTable()
        places: list[HookPlace] = []
        hook_events: list[SymbolicEvent] = []
        for event in recording.events:
            if event.kind == "module":
                places.append(self._add_hook(event, len(places), head))
                hook_events.append(event)
            else:
                self._add(event)
        self._hook_events = tuple(hook_events)
        self._table = HookTable(places)
        self._places = tuple(places)
        self._native = NativeProgram(self._instructions)

    @property
    def foreign_calls(self) -> tuple[str, ...]:
        """What torch computes in every step, in order."""
        return tuple(str(event.target) for event in self._foreign.values())

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
        tokens, outputs = ids.shape[0], rows.shape[0]
        layout = self._layout(tokens, outputs)
        for name, given in (("ids", ids), ("positions", positions), ("rows", rows)):
            layout.views[name].view(-1).copy_(given)
        self._table.set(self.adapters, segments, output_segments)
        hooks, lora, rescale = self._table.addresses
        pages = self._pages.pages(attention)
        step = Step(tokens, outputs, layout.slots.ctypes.data, hooks, lora, rescale, pages)
        called = {self._hook_at[hook]: hook for hook in self._table.called}
        stops = sorted((*self._foreign, *called)) if called else list(self._foreign)
        place = 0
        for stop in stops:
            if stop > place:
                self._native.run(step, place, stop)
            place = stop + 1
            if stop in called:
                place = self._call_hook(called[stop], layout, segments, output_segments, attention)
            elif stop in layout.attention:
                self._attend(stop, layout, attention)
            else:
                layout.calls[stop]()
        if place < len(self._instructions):
            self._native.run(step, place, len(self._instructions))
        return layout.views["logits"]

    def _add(self, event: SymbolicEvent) -> None:
        try:
            if event.kind == "operator":
                self._instructions.extend(self._lowering.instructions(event))
            else:
                number = len(self._pages.layers)
                self._instructions.append(self._lowering.attention(event, number))
                self._pages.layers.append(event.target)
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
        found = self._layouts.get((tokens, outputs))
        if found is not None:
            return found
        places, size = self._plan.addresses(tokens, outputs)
        if size > self._arena.numel():
            # Whatever was laid out before points into the old arena.
            self._layouts.clear()
            self._arena = torch.empty(size, dtype=torch.uint8)
        elif len(self._layouts) >= _REMEMBERED:
            self._layouts.clear()
        layout = self._lay_out(places, tokens, outputs)
        self._layouts[tokens, outputs] = layout
        return layout

    def _lay_out(self, places: list[int], tokens: int, outputs: int) -> _Layout:
        base = self._arena.data_ptr()
        slots = torch.tensor([base + place for place in places], dtype=torch.int64).numpy()

        def view(ref: SymbolicRef) -> torch.Tensor:
            start = places[self._plan.slot_of[ref.buffer]]
            size = [n.at(tokens, outputs) for n in ref.size]
            stride = [n.at(tokens, outputs) for n in ref.stride]
            whole = self._arena[start : start + self._bytes_from(start)].view(ref.dtype)
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

    def _bytes_from(self, start: int) -> int:
        return (self._arena.numel() - start) // 8 * 8


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
