"""Compares the server's tokens with PEFT's. Speeds of wrong answers are not worth printing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtests.workload import Request

# Two candidates closer than this, relative to the largest logit, may swap by rounding alone.
NEAR_TIE = 1e-4

Gap = Callable[[Sequence[int], str | None, Sequence[int]], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token in which an answer leaves the reference."""

    adapter: str | None
    position: int
    expected: int
    got: int
    gap: float


@dataclass(slots=True)
class Verification:
    """What comparisons found so far."""

    requests: int = 0
    equal: int = 0
    near_ties: list[Difference] = field(default_factory=list)
    mismatches: list[Difference] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every difference is explained by a near tie."""
        return not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return asdict(self)


async def compare(
    verification: Verification,
    requests: Sequence[Request],
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    gap: Gap,
) -> None:
    """Add a comparison of two sets of answers to ``verification``.

    After its first different token an answer has another history, so that one alone is judged.
    """
    for request, reference, answer in zip(requests, expected, got, strict=True):
        verification.requests += 1
        pairs = enumerate(zip(reference, answer, strict=True))
        different = next((at for at, (a, b) in pairs if a != b), None)
        if different is None:
            verification.equal += 1
            continue
        pair = (reference[different], answer[different])
        history = [*request.prompt, *reference[:different]]
        distance = await gap(history, request.adapter, pair)
        found = Difference(request.adapter, different, *pair, distance)
        kind = verification.near_ties if distance < NEAR_TIE else verification.mismatches
        kind.append(found)


def idle_adapters(
    requests: Sequence[Request], mixed: Sequence[Sequence[int]], base: Sequence[Sequence[int]]
) -> list[str]:
    """Return the adapters that changed no answer: with them a comparison would prove nothing."""
    changed = {
        request.adapter
        for request, with_adapter, without in zip(requests, mixed, base, strict=True)
        if list(with_adapter) != list(without)
    }
    return sorted({request.adapter for request in requests if request.adapter} - changed)
