"""The requests of a load: who asks which adapter for how much, and when. Seeded throughout."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Popularity = Literal["distinct", "uniform", "zipf", "identical"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``arrival_s`` counts from the start of an open loop; closed loops ignore it."""

    prompt: tuple[int, ...]
    output_tokens: int
    adapter: str | None
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens, uniform from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths need 1 <= low <= high, got {self.low}:{self.high}")

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read ``64`` or ``8:512``."""
        low, colon, high = text.partition(":")
        return cls(int(low), int(high) if colon else int(low))

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What ``make_requests`` makes.

    ``popularity``: ``distinct`` takes the adapters in turn, ``uniform`` draws each with the same
    chance, ``zipf`` the k-th with weight ``k ** -zipf_exponent``, ``identical`` always the first.
    ``rate`` (requests a second) and ``cv`` (coefficient of variation) are those of an open loop's
    gamma-distributed gaps, as in S-LoRA: shape ``1 / cv²``, scale ``cv² / rate``.
    """

    requests: int
    vocabulary: int
    popularity: Popularity
    prompt_tokens: Lengths
    output_tokens: Lengths
    zipf_exponent: float = 1.5
    rate: float | None = None
    cv: float = 1.0


def make_requests(spec: WorkloadSpec, adapters: Sequence[str], seed: int) -> list[Request]:
    """Return the requests of one repetition; another ``seed`` shares no prompt with it."""
    # One stream for each property, so that changing one leaves the others as they were.
    prompts, outputs, choices, gaps = (random.Random(f"{seed}/{kind}") for kind in "poca")
    names = _choose(spec, adapters, choices)
    requests = []
    arrival = 0.0
    for name in names:
        length = spec.prompt_tokens.draw(prompts)
        prompt = tuple(prompts.randrange(spec.vocabulary) for _ in range(length))
        requests.append(Request(prompt, spec.output_tokens.draw(outputs), name, arrival))
        if spec.rate is not None:
            arrival += gaps.gammavariate(1 / spec.cv**2, spec.cv**2 / spec.rate)
    return requests


def base_only(requests: Sequence[Request]) -> list[Request]:
    """Return the same load without adapters."""
    return [replace(request, adapter=None) for request in requests]


def _choose(spec: WorkloadSpec, adapters: Sequence[str], rng: random.Random) -> list[str]:
    count = spec.requests
    match spec.popularity:
        case "distinct":
            return list(itertools.islice(itertools.cycle(adapters), count))
        case "uniform":
            return rng.choices(adapters, k=count)
        case "zipf":
            weights = [rank**-spec.zipf_exponent for rank in range(1, len(adapters) + 1)]
            return rng.choices(adapters, weights, k=count)
        case "identical":
            return [adapters[0]] * count
