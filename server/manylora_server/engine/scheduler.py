"""Chooses what each step computes. Knows no tensors.

Decode tokens and prefill chunks share a step under one token budget. Within the budget the order
is: sequences that only need their next token, then prefill of running sequences, then new ones;
each by priority and arrival. A sequence for which no KV block is left preempts the running one
that is last in that order; a preempted sequence is computed again from its tokens later.

A sequence whose adapters are not on the device waits without holding up others; where adapters
outnumber device slots they take turns (``slot_turns``). A mix gets the slots of all its adapters at
once or none. Where the most pressing party that waits for slots needs several, those that become
free are not given to others meanwhile, so that single adapters cannot starve it; it waits for one
turn of each at the most, and so do those behind it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from manylora_server.core.errors import AdapterLoadError
from manylora_server.core.types import Readiness
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.sequence import Sequence, SequenceStatus
from manylora_server.engine.slot_turns import Claim, Party, SlotTurns, claims, out_of_reach


class SlotProvider(Protocol):
    """Device residency as the scheduler sees it; see ``adapters.residency.Residency``."""

    def begin_step(self) -> None:
        """Take promises back."""

    def prepare(self, digests: Party) -> Readiness:
        """Say whether all of the adapters are ready, and make them so together if possible.

        Raises ``AdapterLoadError``.
        """

    def shortage(self, digests: Party) -> int:
        """Return how many slots more the adapters need than are to be had now."""

    def fits(self, digests: Iterable[str]) -> bool:
        """Whether the adapters can be on the device at once, beside those that must stay."""

    def acquire(self, digest: str) -> int:
        """Return the slot of a ready adapter, referenced."""

    def release(self, slot: int) -> None:
        """Drop the reference."""

    def references(self, digest: str) -> int:
        """Return how many sequences hold the adapter's slot."""

    def kept(self, digest: str) -> bool:
        """Whether the adapter's slot is not to be given away in this step."""

    def expect(self, digest: str) -> None:
        """Take note of a new request for the adapter."""

    def forget(self, digest: str) -> None:
        """Take note that a request for the adapter has ended."""


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
        self._step = 0
        self._turns = SlotTurns()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; its adapters are brought to the device from now on."""
        for digest in sequence.adapters:
            self._slots.expect(digest)
        self._wait(sequence)

    def schedule(self) -> list[Scheduled]:
        """Return the next step's work; every sequence in it is running and holds its blocks."""
        self._step += 1
        self._slots.begin_step()
        ready = self._grant_slots()
        plan: list[Scheduled] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, s.order)):
            if budget == 0:
                break
            # One that an earlier one preempted, or that is parked, has no part in this step.
            if sequence.status is not SequenceStatus.RUNNING or sequence.parked:
                continue
            if self._extend(sequence, plan):
                count = min(sequence.remaining, budget)
                plan.append(Scheduled(sequence, count))
                budget -= count
        plan.extend(self._admit(budget, ready))
        return plan

    def advance(self, scheduled: Scheduled) -> None:
        """Take note that the step computed ``scheduled``."""
        sequence = scheduled.sequence
        sequence.computed += scheduled.count
        self.blocks.commit(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget ``sequence``, running or waiting, and free all it holds; once is enough."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        for digest in sequence.adapters:
            self._slots.forget(digest)

    def check_integrity(self) -> None:
        """Assert that blocks and slots are held by running sequences and by nobody else."""
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.WAITING for s in self.waiting)
        assert all(not s.block_table and not s.slots for s in self.waiting)
        self.blocks.check_integrity(self.running)
        held: dict[str, int] = {}
        for sequence in self.running:
            assert len(sequence.slots) in (0, len(sequence.adapters)), "half of a mix has slots"
            for digest in sequence.adapters:
                held[digest] = held.get(digest, 0) + (not sequence.parked)
        for digest, count in held.items():
            assert self._slots.references(digest) == count, "slot references and users disagree"

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        sequence.waits_since = self._step
        insort(self.waiting, sequence, key=lambda s: s.order)

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
        self._wait(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self._release_slots(sequence)

    def _release_slots(self, sequence: Sequence) -> None:
        if not sequence.slots:
            return
        for slot in sequence.slots:
            self._slots.release(slot)
        sequence.slots = ()
        self._turns.left(sequence.adapters)

    def _take_slots(self, sequence: Sequence) -> None:
        self._turns.joined(sequence.adapters, self._step, resumed=sequence.parked)
        sequence.slots = tuple(self._slots.acquire(digest) for digest in sequence.adapters)

    def _grant_slots(self) -> set[Party]:
        """Find out which parties that want slots can run, parking others where it is their turn.

        Parked sequences of a party that is ready get their slots back. An adapter that cannot be
        loaded ends its sequences, which ``failed`` then holds. Returns the parties that are ready.
        """
        ready: set[Party] = set()
        parked = [sequence for sequence in self.running if sequence.parked]
        reserved = False
        for claim in claims([*parked, *self._admissible()], self._step):
            if claim.sequence.status is SequenceStatus.FINISHED:
                continue  # It failed with another party that needs the same adapter.
            if reserved and not self._uses_nothing_new(claim.party):
                continue
            try:
                readiness = self._prepare(claim)
            except AdapterLoadError as error:
                self._fail(claim.party, error)
                continue
            if readiness is Readiness.READY:
                ready.add(claim.party)
            elif readiness is Readiness.NO_ROOM:
                beyond = out_of_reach(claim, self.running)
                reserved = reserved or self._slots.fits(beyond.union(claim.party))
        for sequence in parked:
            if sequence.parked and sequence.adapters in ready:
                self._take_slots(sequence)
        return ready

    def _prepare(self, claim: Claim) -> Readiness:
        """Do what can be done for ``claim``, parking others if need be."""
        readiness = self._slots.prepare(claim.party)
        if readiness is not Readiness.NO_ROOM:
            return readiness
        shortage = self._slots.shortage(claim.party)
        kept = self._slots.kept
        victims = self._turns.victims(claim, self.running, self._step, kept, shortage)
        if victims is None:
            return readiness
        self._park(victims)
        return self._slots.prepare(claim.party)

    def _uses_nothing_new(self, party: Party) -> bool:
        """Whether ``party`` can go on without a slot that somebody more pressing waits for."""
        return self._turns.has(party) or all(self._slots.kept(digest) for digest in party)

    def _admissible(self) -> Iterator[Sequence]:
        """Yield the waiting sequences with adapters for which there are seats and blocks."""
        seats = self._max_sequences - len(self.running)
        blocks = self.blocks.available
        for sequence in self.waiting:
            blocks -= self.blocks.blocks_for(len(sequence.token_ids))
            if seats <= 0 or blocks < 0:
                return
            seats -= 1
            if sequence.adapters:
                yield sequence

    def _park(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._release_slots(sequence)
            sequence.waits_since = self._step

    def _fail(self, party: Party, error: AdapterLoadError) -> None:
        """End all sequences that need the adapter at fault; without one, those of ``party``."""
        for sequence in [*self.waiting, *self.running]:
            needs = sequence.adapters
            if (needs == party) if error.digest is None else (error.digest in needs):
                self.finish(sequence)
                self.failed.append((sequence, error))

    def _admit(self, budget: int, ready: set[Party]) -> Iterator[Scheduled]:
        """Move waiting sequences to running while budget, seats and blocks last."""
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_sequences:
                return
            if sequence.adapters and sequence.adapters not in ready:
                continue
            # Blocks are given in order, so that a long prompt is not passed for ever.
            if not self.blocks.admit(sequence):
                return
            if sequence.adapters:
                self._take_slots(sequence)
            if sequence.output_length == 0:
                sequence.cached_tokens = sequence.computed
            self.waiting.remove(sequence)
            sequence.status = SequenceStatus.RUNNING
            insort(self.running, sequence, key=lambda s: s.order)
            count = min(sequence.remaining, budget)
            budget -= count
            yield Scheduled(sequence, count)
