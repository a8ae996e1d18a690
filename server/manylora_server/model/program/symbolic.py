"""One recording for steps of any size, from several of given sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from manylora_server.model.program.affine import Affine, NotAffineError, solve
from manylora_server.model.program.recorder import (
    Constant,
    Event,
    NotRecordableError,
    Recording,
    Ref,
)

# Constants that are made anew in every pass are compared by value; large ones are never made so.
_COMPARED_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class SymbolicRef:
    """A ``Ref`` for steps of any size."""

    buffer: int
    offset: Affine
    size: tuple[Affine, ...]
    stride: tuple[Affine, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SymbolicEvent:
    """An ``Event`` for steps of any size: ``args`` may hold ``SymbolicRef`` and ``Affine``."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[SymbolicRef, ...]


@dataclass(frozen=True, slots=True)
class SymbolicRecording:
    """A ``Recording`` for steps of any size."""

    events: tuple[SymbolicEvent, ...]
    buffers: tuple[Affine, ...]
    inputs: dict[str, SymbolicRef]
    output: SymbolicRef


def unify(recordings: Sequence[Recording]) -> SymbolicRecording:
    """Join recordings made at ``affine.SAMPLES``; ``NotRecordableError`` where they disagree."""
    first = recordings[0]
    for name in ("events", "buffers"):
        counts = {len(getattr(recording, name)) for recording in recordings}
        if len(counts) != 1:
            raise NotRecordableError(f"the number of {name} depends on the step's size")
    try:
        events = tuple(
            _event(list(events))
            for events in zip(*(recording.events for recording in recordings), strict=True)
        )
        buffers = tuple(
            solve(sizes)
            for sizes in zip(*(recording.buffers for recording in recordings), strict=True)
        )
        inputs = {
            name: _ref([recording.inputs[name] for recording in recordings])
            for name in first.inputs
        }
        outputs = [recording.output for recording in recordings]
        assert all(output is not None for output in outputs)
        output = _ref([output for output in outputs if output is not None])
    except NotAffineError as error:
        raise NotRecordableError(f"a size is no affine function of the step's: {error}") from error
    return SymbolicRecording(events, buffers, inputs, output)


def _event(events: list[Event]) -> SymbolicEvent:
    first = events[0]
    if any(event.kind != first.kind or event.target != first.target for event in events):
        raise NotRecordableError(f"what follows depends on the step's size: {first.target}")
    args = _value([event.args for event in events])
    kwargs = _value([event.kwargs for event in events])
    outs = _value([event.outs for event in events])
    return SymbolicEvent(first.kind, first.target, args, kwargs, outs)


def _value(values: list[Any]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotRecordableError(f"an argument changes its kind with the step's size: {values}")
    if isinstance(first, Ref):
        return _ref(values)
    if isinstance(first, Constant):
        return _constant(values)
    if isinstance(first, tuple | list):
        if len({len(value) for value in values}) != 1:
            raise NotRecordableError("an argument's length depends on the step's size")
        return type(first)([_value(list(parts)) for parts in zip(*values, strict=True)])
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise NotRecordableError("keyword arguments depend on the step's size")
        return {key: _value([value[key] for value in values]) for key in first}
    if all(value == first for value in values):
        return first
    if isinstance(first, int) and not isinstance(first, bool):
        return solve(values)
    raise NotRecordableError(f"an argument depends on the step's size: {values}")


def _ref(refs: Sequence[Ref]) -> SymbolicRef:
    first = refs[0]
    if any(
        ref.buffer != first.buffer or ref.dtype != first.dtype or len(ref.size) != len(first.size)
        for ref in refs
    ):
        raise NotRecordableError("a tensor's place depends on the step's size")
    dimensions = range(len(first.size))
    return SymbolicRef(
        buffer=first.buffer,
        offset=solve([ref.offset for ref in refs]),
        size=tuple(solve([ref.size[i] for ref in refs]) for i in dimensions),
        stride=tuple(solve([ref.stride[i] for ref in refs]) for i in dimensions),
        dtype=first.dtype,
    )


def _constant(values: Sequence[Constant]) -> Constant:
    first = values[0].tensor
    for other in (value.tensor for value in values[1:]):
        if other is first:
            continue
        alike = other.shape == first.shape and other.dtype == first.dtype
        if alike and first.layout is torch.strided and other.layout is torch.strided:
            if other.data_ptr() == first.data_ptr() and other.stride() == first.stride():
                continue
            if first.numel() <= _COMPARED_ELEMENTS and torch.equal(other, first):
                continue
        raise NotRecordableError("a constant depends on the step's size")
    return values[0]
