"""One request on its way through the engine."""

from __future__ import annotations

from enum import Enum

from manylora_server.core.types import Request


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED; preemption leads from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens, KV blocks and adapter slots of one request.

    ``adapters`` are the digests of the adapters it needs on the device, ``slots`` where they are:
    all of them in the same order, or none. A running sequence without its adapters' slots is
    *parked*: it keeps its blocks and goes on once it has slots again. ``waits_since`` is the
    scheduler's step at which it began to wait.

    ``token_ids`` is prompt and output; the keys and values of the first ``computed`` of them are
    in ``block_table``, whose first ``committed`` blocks are known for sharing. The scheduler owns
    ``block_table``, ``slots``, ``computed`` and ``status``.
    """

    __slots__ = (
        "adapters",
        "block_hashes",
        "block_table",
        "cached_tokens",
        "committed",
        "computed",
        "prompt_length",
        "request",
        "slots",
        "status",
        "token_ids",
        "waits_since",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.adapters = () if request.adapter is None else request.adapter.digests
        self.token_ids = list(request.prompt_token_ids)
        self.prompt_length = len(self.token_ids)
        self.computed = 0
        self.cached_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.committed = 0
        self.slots: tuple[int, ...] = ()
        self.waits_since = 0
        self.status = SequenceStatus.WAITING

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values must be computed before the next can be sampled."""
        return len(self.token_ids) - self.computed

    @property
    def output_length(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def content(self) -> str | None:
        """What its rows are computed with, ``AdapterMix.key``; ``None`` for the base."""
        return None if self.request.adapter is None else self.request.adapter.key

    @property
    def weighted_slots(self) -> tuple[tuple[int, float], ...]:
        """Each of ``slots`` with its adapter's weight."""
        mix = self.request.adapter
        return () if mix is None else tuple(zip(self.slots, mix.weights, strict=True))

    @property
    def parked(self) -> bool:
        """Whether it runs, but its adapters have lost their slots for now."""
        return bool(self.adapters) and not self.slots and self.status is SequenceStatus.RUNNING

    @property
    def order(self) -> tuple[int, float]:
        """Sort key: higher priority first, then earlier arrival."""
        return (-self.request.priority, self.request.arrival)
