"""Whose turn it is to hold a device slot, when more adapters are wanted than there are slots.

Waiting for a slot until some request ends would make the first token of every adapter beyond the
last slot wait for a whole answer. So adapters take turns: the sequences of one whose turn is over
are parked (they keep their KV blocks) and its slot goes to an adapter that waits. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manylora_server.engine.sequence import Sequence

TURN_STEPS = 16
"""Steps after which an adapter gives way to another one."""

PATIENCE_STEPS = 32
"""Steps by which a request that has no token yet goes before parked ones; after as many, a parked
one is as urgent as it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``sequence`` is the most pressing of those that want its adapter's slot."""

    sequence: Sequence
    digest: str
    urgent: bool


def claims(wanting: Iterable[Sequence], step: int) -> list[Claim]:
    """Return one claim per adapter, the most pressing first.

    Priority decides first; then who has waited longest, where a request without a token counts as
    having waited ``PATIENCE_STEPS`` more.
    """
    best: dict[str, tuple[tuple[int, int, float], Sequence]] = {}
    for sequence in wanting:
        digest = sequence.digest
        assert digest is not None
        bonus = PATIENCE_STEPS if sequence.output_length == 0 else 0
        request = sequence.request
        rank = (-request.priority, sequence.waits_since - bonus, request.arrival)
        if digest not in best or rank < best[digest][0]:
            best[digest] = (rank, sequence)
    return [
        Claim(
            sequence,
            digest,
            sequence.output_length == 0 or step - sequence.waits_since >= PATIENCE_STEPS,
        )
        for digest, (_, sequence) in sorted(best.items(), key=lambda item: item[1][0])
    ]


@dataclass(frozen=True, slots=True)
class _Turn:
    since: int
    resumed: bool


class SlotTurns:
    """Remembers since which step each adapter has held its slot, and whether it was parked before.

    A turn that was resumed is not cut short, so that whatever comes, a parked adapter gets
    ``TURN_STEPS`` steps each time it is let back.
    """

    def __init__(self) -> None:
        self._turns: dict[str, _Turn] = {}

    def began(self, digest: str, step: int, *, resumed: bool) -> None:
        """Take note that the adapter's sequences have its slot from ``step`` on."""
        self._turns.setdefault(digest, _Turn(step, resumed))

    def ended(self, digest: str) -> None:
        """Take note that no sequence holds the adapter's slot any more."""
        self._turns.pop(digest, None)

    def victim(
        self, claim: Claim, running: Iterable[Sequence], step: int, kept: Callable[[str], bool]
    ) -> list[Sequence] | None:
        """Return the sequences to park so that ``claim`` gets a slot; ``None`` if it must wait.

        An adapter is asked to give way if none of its sequences has a higher priority than the
        claim, ``kept`` does not protect it, and its turn is over: after ``TURN_STEPS`` steps, or,
        if the claim is urgent and it is the adapter's first turn, once each of its sequences has
        got a token. Of several, the one with the longest turn.
        """
        holders: dict[str, list[Sequence]] = {}
        for sequence in running:
            if sequence.slot is not None and sequence.digest is not None:
                holders.setdefault(sequence.digest, []).append(sequence)
        best: tuple[int, str] | None = None
        for digest, sequences in holders.items():
            turn = self._turns[digest]
            age = step - turn.since
            if kept(digest) or not age:
                continue
            if any(s.request.priority > claim.sequence.request.priority for s in sequences):
                continue
            served = not turn.resumed and all(s.remaining == 1 for s in sequences)
            over = age >= TURN_STEPS or (claim.urgent and served)
            if over and (best is None or (age, digest) > best):
                best = (age, digest)
        return None if best is None else holders[best[1]]
