"""Chooses what each step computes. Knows no tensors.

Decode tokens and prefill chunks share a step under one token budget. Within the budget the order
is: sequences that only need their next token, then prefill of running sequences, then new ones;
each by priority and arrival. A sequence for which no KV block is left preempts the running one
that is last in that order; a preempted sequence is computed again from its tokens later.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from manylora_server.core.errors import AdapterLoadError
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.sequence import Sequence, SequenceStatus


class SlotProvider(Protocol):
    """Device residency as the scheduler sees it."""

    def acquire(self, sequence: Sequence) -> int | None:
        """Return the slot of the sequence's adapter, referenced; ``None`` if all are in use.

        Raises ``AdapterLoadError``.
        """

    def release(self, slot: int) -> None:
        """Drop the reference."""

    def references(self, digest: str) -> int:
        """Return how many sequences hold the adapter's slot."""

    def is_resident(self, digest: str) -> bool:
        """Whether the adapter has a slot now."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """``count`` tokens of ``sequence`` from ``sequence.computed`` on."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after the step."""
        return self.count == self.sequence.remaining


class Scheduler:
    """Owns every unfinished sequence: ``waiting`` and ``running``, both in scheduling order."""

    def __init__(
        self, blocks: KVBlocks, slots: SlotProvider, max_batch_tokens: int, max_sequences: int
    ) -> None:
        self.blocks = blocks
        self._slots = slots
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.failed: list[tuple[Sequence, AdapterLoadError]] = []
        self.preemptions = 0
        # Adapter that waits for a slot -> resident adapter that takes no later requests until
        # then. Without it, steady traffic of the resident ones would keep it out for ever.
        self._yielding: dict[str, str] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def schedule(self) -> list[Scheduled]:
        """Return the next step's work; every sequence in it is running and holds its blocks."""
        plan: list[Scheduled] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, s.order)):
            if budget == 0:
                break
            if sequence.status is SequenceStatus.RUNNING and self._extend(sequence, plan):
                count = min(sequence.remaining, budget)
                plan.append(Scheduled(sequence, count))
                budget -= count
        plan.extend(self._admit(budget))
        return plan

    def advance(self, scheduled: Scheduled) -> None:
        """Take note that the step computed ``scheduled``."""
        sequence = scheduled.sequence
        sequence.computed += scheduled.count
        self.blocks.commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget ``sequence``, running or waiting, and free all it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def check_integrity(self) -> None:
        """Assert that blocks and slots are held by running sequences and by nobody else."""
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.WAITING for s in self.waiting)
        assert all(not s.block_table and s.slot is None for s in self.waiting)
        self.blocks.check_integrity(self.running)
        held: dict[str, int] = {}
        for sequence in self.running:
            if sequence.digest is not None:
                held[sequence.digest] = held.get(sequence.digest, 0) + 1
        for digest, count in held.items():
            assert self._slots.references(digest) == count, "slot references and users disagree"

    def _extend(self, sequence: Sequence, plan: list[Scheduled]) -> bool:
        """Get ``sequence`` its next block, at the cost of later ones; false if it lost its own."""
        planned = {id(scheduled.sequence) for scheduled in plan}
        while not self.blocks.extend(sequence):
            victims = [s for s in self.running if id(s) not in planned]
            victim = max(victims, key=lambda s: s.order)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=lambda s: s.order)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        if sequence.slot is not None:
            self._slots.release(sequence.slot)
            sequence.slot = None

    def _admit(self, budget: int) -> Iterator[Scheduled]:
        """Move waiting sequences to running while budget, blocks and slots last."""
        self._update_yielding()
        held_back = set(self._yielding.values())
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_sequences:
                return
            digest = sequence.digest
            if digest in held_back:
                continue
            if digest is not None and not self._take_slot(sequence, digest):
                if sequence.status is SequenceStatus.WAITING:
                    held_back |= {digest, self._yielding[digest]}
                continue
            # Blocks are given in order, so that a long prompt is not passed for ever.
            if not self.blocks.admit(sequence):
                self._release(sequence)
                return
            if sequence.output_length == 0:
                sequence.cached_tokens = sequence.computed
            self.waiting.remove(sequence)
            sequence.status = SequenceStatus.RUNNING
            insort(self.running, sequence, key=lambda s: s.order)
            count = min(sequence.remaining, budget)
            budget -= count
            yield Scheduled(sequence, count)

    def _take_slot(self, sequence: Sequence, digest: str) -> bool:
        """Get ``sequence`` its adapter's slot; false if there is none.

        An adapter that cannot be loaded ends the sequence, which ``failed`` then holds.
        """
        try:
            sequence.slot = self._slots.acquire(sequence)
        except AdapterLoadError as error:
            self.finish(sequence)
            self.failed.append((sequence, error))
            return False
        if sequence.slot is None:
            self._yielding.setdefault(digest, self._choose_yielding(digest))
            return False
        self._yielding.pop(digest, None)
        return True

    def _choose_yielding(self, digest: str) -> str:
        """Return the resident adapter with the fewest running sequences, not yet yielding."""
        residents = {s.digest for s in self.running if s.digest is not None}
        free = [d for d in residents if d not in self._yielding.values()] or list(residents)
        return min(free, key=lambda d: (self._slots.references(d), d)) if free else digest

    def _update_yielding(self) -> None:
        """Forget pairs whose waiting adapter is gone or whose resident one has left its slot."""
        wanted = {s.digest for s in self.waiting}
        self._yielding = {
            waiting: resident
            for waiting, resident in self._yielding.items()
            if waiting in wanted
            and not self._slots.is_resident(waiting)
            and self._slots.references(resident)
        }
