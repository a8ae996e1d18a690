"""Where a replayed pass keeps what it computes: buffers whose lives do not overlap share a slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from manylora_server.model.program.affine import Affine
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRecording, SymbolicRef

ALIGNMENT = 64


class Arena:
    """Memory that grows, for programs of which only one runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def address(self) -> int:
        """Where it begins; another address means that it has grown."""
        return self._memory.data_ptr()

    def reserve(self, size: int) -> bool:
        """Make room for ``size`` bytes; true if that moved it."""
        if size <= self._memory.numel():
            return False
        self._memory = torch.empty(size, dtype=torch.uint8)
        return True

    def since(self, start: int) -> torch.Tensor:
        """Return the bytes from ``start`` on, in a number that any dtype divides."""
        return self._memory[start : start + (self._memory.numel() - start) // 8 * 8]


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """``slot_of`` each buffer, and a bound of each slot's bytes."""

    slot_of: tuple[int, ...]
    slots: tuple[Affine, ...]

    def addresses(self, tokens: int, outputs: int) -> tuple[list[int], int]:
        """Return where each slot begins, in bytes, and the bytes of all, for a step's size."""
        places, end = [], 0
        for slot in self.slots:
            places.append(end)
            end += -(-slot.at(tokens, outputs) // ALIGNMENT) * ALIGNMENT
        return places, end


def plan_arena(recording: SymbolicRecording) -> ArenaPlan:
    """Give every buffer a slot for as long as it is needed.

    Inputs live from before the first event; the output beyond the last. A free slot of the most
    similar size is taken, which keeps the arena small and in the caches.
    """
    last_use = [-1] * len(recording.buffers)
    for index, event in enumerate(recording.events):
        for ref in refs_of(event):
            last_use[ref.buffer] = index
    last_use[recording.output.buffer] = len(recording.events)
    slot_of = [-1] * len(recording.buffers)
    slots: list[Affine] = []
    free: list[int] = []
    ends: dict[int, list[int]] = {}

    def place(buffer: int) -> None:
        size = recording.buffers[buffer]
        if free:
            slot = min(free, key=lambda number: _difference(slots[number], size))
            free.remove(slot)
            slots[slot] = slots[slot].largest(size)
        else:
            slot = len(slots)
            slots.append(size)
        slot_of[buffer] = slot
        ends.setdefault(last_use[buffer], []).append(slot)

    for ref in recording.inputs.values():
        place(ref.buffer)
    for index, event in enumerate(recording.events):
        for ref in event.outs:
            if slot_of[ref.buffer] < 0:
                place(ref.buffer)
        # Only after its last reader ran may a slot be written by another.
        free.extend(ends.pop(index, ()))
    return ArenaPlan(tuple(slot_of), tuple(slots))


def refs_of(event: SymbolicEvent) -> Iterator[SymbolicRef]:
    """Yield all tensors that ``event`` reads or writes."""
    leaves: Sequence[Any] = tree_leaves((event.args, event.kwargs, event.outs))
    yield from (leaf for leaf in leaves if isinstance(leaf, SymbolicRef))


def _difference(have: Affine, want: Affine) -> tuple[int, int]:
    per_token = abs(have.per_token - want.per_token) + abs(have.per_output - want.per_output)
    return per_token, abs(have.constant - want.constant)
