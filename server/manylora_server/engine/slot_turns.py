"""Whose turn it is to hold a device slot, when more adapters are wanted than there are slots.

Waiting for a slot until some request ends would make the first token of every adapter beyond the
last slot wait for a whole answer. So adapters take turns: the sequences of one whose turn is over
are parked (they keep their KV blocks) and its slot goes to an adapter that waits. Knows no tensors.

Those who take turns are *parties*: the sequences that need the same adapters, one or, for a mix,
several, which get their slots together. A slot that several parties use is free once each of them
has had its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from manylora_server.engine.sequence import Sequence

TURN_STEPS = 16
"""Steps after which an adapter gives way to another one."""

PATIENCE_STEPS = 32
"""Steps by which a request that has no token yet goes before parked ones; after as many, a parked
one is as urgent as it."""

Party = tuple[str, ...]
"""The digests of the adapters that some sequences need on the device, in order."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``sequence`` is the most pressing of the party that wants slots."""

    sequence: Sequence
    party: Party
    urgent: bool


def claims(wanting: Iterable[Sequence], step: int) -> list[Claim]:
    """Return one claim per party, the most pressing first.

    Priority decides first; then who has waited longest, where a request without a token counts as
    having waited ``PATIENCE_STEPS`` more.
    """
    best: dict[Party, tuple[tuple[int, int, float], Sequence]] = {}
    for sequence in wanting:
        party = sequence.adapters
        assert party
        bonus = PATIENCE_STEPS if sequence.output_length == 0 else 0
        request = sequence.request
        rank = (-request.priority, sequence.waits_since - bonus, request.arrival)
        if party not in best or rank < best[party][0]:
            best[party] = (rank, sequence)
    return [
        Claim(
            sequence,
            party,
            sequence.output_length == 0 or step - sequence.waits_since >= PATIENCE_STEPS,
        )
        for party, (_, sequence) in sorted(best.items(), key=lambda item: item[1][0])
    ]


@dataclass(slots=True)
class _Turn:
    since: int
    resumed: bool
    sequences: int = 0


class SlotTurns:
    """Remembers since which step each party has held its slots, and whether it was parked before.

    A turn that was resumed is not cut short, so that whatever comes, a parked party gets
    ``TURN_STEPS`` steps each time it is let back.
    """

    def __init__(self) -> None:
        self._turns: dict[Party, _Turn] = {}

    def joined(self, party: Party, step: int, *, resumed: bool) -> None:
        """Take note that one more of the party's sequences has its slots, from ``step`` on."""
        self._turns.setdefault(party, _Turn(step, resumed)).sequences += 1

    def left(self, party: Party) -> None:
        """Take note that one of them has given its slots back; the last one ends the turn."""
        turn = self._turns[party]
        turn.sequences -= 1
        if not turn.sequences:
            del self._turns[party]

    def has(self, party: Party) -> bool:
        """Whether it is the party's turn."""
        return party in self._turns

    def victims(
        self,
        claim: Claim,
        running: Iterable[Sequence],
        step: int,
        kept: Callable[[str], bool],
        shortage: int,
    ) -> list[Sequence] | None:
        """Return the sequences to park so that ``claim`` gets ``shortage`` slots more.

        ``None`` if it must wait. A party gives way if none of its sequences has a higher priority
        than the claim, and its turn is over: after ``TURN_STEPS`` steps, or, if the claim is urgent
        and it is the party's first turn, once each of its sequences has got a token. A slot can be
        had if every party that uses it gives way, ``kept`` does not protect its adapter, and the
        claim does not need that itself. Of several, those whose users have had the longest turns.
        """
        holders = _holders(running)
        willing = {
            party: step - self._turns[party].since
            for party, sequences in holders.items()
            if self._gives_way(party, sequences, claim, step)
        }
        users = _users(holders)
        wanted = {
            digest: min(willing[party] for party in parties)
            for digest, parties in users.items()
            if parties <= willing.keys() and digest not in claim.party and not kept(digest)
        }
        parked: set[Party] = set()
        freed: set[str] = set()
        for _, digest in sorted(((age, digest) for digest, age in wanted.items()), reverse=True):
            if len(freed) >= shortage:
                break
            if digest not in freed:
                parked |= users[digest]
                freed = {other for other in wanted if users[other] <= parked}
        if len(freed) < shortage:
            return None
        return [sequence for party, held in holders.items() if party in parked for sequence in held]

    def _gives_way(
        self, party: Party, sequences: SequenceOf[Sequence], claim: Claim, step: int
    ) -> bool:
        turn = self._turns[party]
        age = step - turn.since
        if not age or _outranks(sequences, claim):
            return False
        served = not turn.resumed and all(sequence.remaining == 1 for sequence in sequences)
        return age >= TURN_STEPS or (claim.urgent and served)


def out_of_reach(claim: Claim, running: Iterable[Sequence]) -> set[str]:
    """Return the adapters whose slots ``claim`` cannot have however long their turns last."""
    return {
        digest
        for party, sequences in _holders(running).items()
        if _outranks(sequences, claim)
        for digest in party
    }


def _holders(running: Iterable[Sequence]) -> dict[Party, list[Sequence]]:
    """Return the sequences that hold slots, by party."""
    holders: dict[Party, list[Sequence]] = {}
    for sequence in running:
        if sequence.slots:
            holders.setdefault(sequence.adapters, []).append(sequence)
    return holders


def _users(parties: Iterable[Party]) -> dict[str, set[Party]]:
    """Return which of ``parties`` use each adapter."""
    users: dict[str, set[Party]] = {}
    for party in parties:
        for digest in party:
            users.setdefault(digest, set()).add(party)
    return users


def _outranks(sequences: Iterable[Sequence], claim: Claim) -> bool:
    priority = claim.sequence.request.priority
    return any(sequence.request.priority > priority for sequence in sequences)
