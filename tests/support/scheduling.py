"""A scheduler with pretended device slots and steps that always succeed; no tensors."""

from __future__ import annotations

from collections.abc import Iterable

from manylora_server.core.errors import AdapterLoadError
from manylora_server.core.types import AdapterChoice, AdapterMix, Readiness, Request, SamplingParams
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.scheduler import Scheduled, Scheduler
from manylora_server.engine.sequence import Sequence, SequenceStatus


class FakeSlots:
    """Least recently used slots; digests in ``broken`` cannot be loaded.

    An adapter that nobody asked for before takes ``load_steps`` steps from disk to host memory.
    """

    def __init__(self, count: int, load_steps: int = 0) -> None:
        self.holders: list[str | None] = [None] * count
        self.held: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self.recent: list[str] = []
        self.broken: set[str] = set()
        self.pinned: set[str] = set()
        self.promised: set[str] = set()
        self.load_steps = load_steps
        self.arriving: dict[str, int] = {}
        self.loads = 0

    def begin_step(self) -> None:
        self.promised.clear()
        self.arriving = {digest: max(0, left - 1) for digest, left in self.arriving.items()}

    def expect(self, digest: str) -> None:
        self.expected[digest] = self.expected.get(digest, 0) + 1
        self.arriving.setdefault(digest, self.load_steps)

    def forget(self, digest: str) -> None:
        self.expected[digest] -= 1
        assert self.expected[digest] >= 0

    def prepare(self, digests: tuple[str, ...]) -> Readiness:
        assert all(self.expected[digest] for digest in digests), "prepared for nobody"
        missing = [digest for digest in digests if digest not in self.holders]
        if any(self.arriving[digest] for digest in missing):
            return Readiness.LOADING
        if self.shortage(digests):
            return Readiness.NO_ROOM
        for digest in missing:
            if digest in self.broken:
                raise AdapterLoadError("it is broken", digest)
        self.promised.update(digests)
        for digest in missing:
            free = self._free(())
            order = [self.recent.index(d) if (d := self.holders[i]) else -1 for i in free]
            self.holders[free[order.index(min(order))]] = digest
            self.recent = [d for d in self.recent if d != digest] + [digest]
            self.loads += 1
        return Readiness.READY

    def shortage(self, digests: tuple[str, ...]) -> int:
        missing = [digest for digest in digests if digest not in self.holders]
        return max(0, len(missing) - len(self._free(digests)))

    def fits(self, digests: Iterable[str]) -> bool:
        return len({*digests, *self.pinned}) <= len(self.holders)

    def acquire(self, digest: str) -> int:
        self.held[digest] = self.held.get(digest, 0) + 1
        self.recent = [d for d in self.recent if d != digest] + [digest]
        return self.holders.index(digest)

    def release(self, slot: int) -> None:
        digest = self.holders[slot]
        assert digest is not None
        self.held[digest] -= 1
        assert self.held[digest] >= 0

    def references(self, digest: str) -> int:
        return self.held.get(digest, 0) if digest in self.holders else 0

    def kept(self, digest: str) -> bool:
        return digest in self.promised or digest in self.pinned

    def _free(self, needed: Iterable[str]) -> list[int]:
        return [
            index
            for index, digest in enumerate(self.holders)
            if digest is None or (digest not in needed and self._idle(digest))
        ]

    def _idle(self, digest: str) -> bool:
        return not self.held.get(digest) and not self.kept(digest)


def mix_of(names: str) -> AdapterMix:
    """Return ``a``, or ``a+b`` in equal parts; each name is its own digest."""
    members = names.split("+")
    return AdapterMix(tuple((AdapterChoice(n, n), 1 / len(members)) for n in members))


class World:
    """A scheduler whose steps always succeed; sequences end after their ``max_tokens``."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_tokens: int = 4,
        slots: int = 2,
        budget: int = 16,
        most: int = 8,
        prefix_cache: bool = True,
        load_steps: int = 0,
    ) -> None:
        self.slots = FakeSlots(slots, load_steps)
        self.budget, self.most = budget, most
        self.scheduler = Scheduler(
            KVBlocks(blocks, block_tokens, prefix_cache=prefix_cache), self.slots, budget, most
        )
        self.finished: list[str] = []
        self.clock = 0.0

    def add(
        self,
        name: str,
        prompt: int | list[int],
        new: int = 3,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Sequence:
        """Queue a request; ``adapter`` may be several names with ``+`` between them."""
        # Prompts of a number of tokens share nothing with each other.
        first = 1000 * int(self.clock + 1)
        tokens = [first + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        self.clock += 1
        sequence = Sequence(
            Request(
                name,
                tuple(tokens),
                SamplingParams(max_tokens=new),
                None if adapter is None else mix_of(adapter),
                priority,
                arrival=self.clock,
            )
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[str, int]]:
        plan = self.scheduler.schedule()
        self._check(plan)
        for scheduled in plan:
            self.scheduler.advance(scheduled)
        for scheduled in plan:
            sequence = scheduled.sequence
            if sequence.remaining:
                continue
            sequence.token_ids.append(7)
            if sequence.output_length >= sequence.request.sampling.max_tokens:
                self.scheduler.finish(sequence)
                self.finished.append(sequence.request.request_id)
        for sequence, _ in self.scheduler.failed:
            self.finished.append(sequence.request.request_id)
        self.scheduler.failed = []
        self.scheduler.check_integrity()
        return [(s.sequence.request.request_id, s.count) for s in plan]

    def run(self, limit: int = 2000) -> int:
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps += 1
            assert steps < limit, "it does not end"
        return steps

    def _check(self, plan: list[Scheduled]) -> None:
        assert sum(s.count for s in plan) <= self.budget
        assert len({id(s.sequence) for s in plan}) == len(plan)
        assert len(self.scheduler.running) <= self.most
        for scheduled in plan:
            sequence = scheduled.sequence
            assert sequence.status is SequenceStatus.RUNNING
            assert 0 < scheduled.count <= sequence.remaining
            assert scheduled.completes == (scheduled.count == sequence.remaining)
            room = len(sequence.block_table) * self.scheduler.blocks.block_tokens
            assert room >= sequence.computed + scheduled.count
            holders = self.slots.holders
            assert tuple(holders[slot] for slot in sequence.slots) == sequence.adapters
