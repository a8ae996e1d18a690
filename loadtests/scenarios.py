"""The named scenarios. Every field can be changed on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadtests.workload import Lengths, Popularity

_SIXTY_FOUR = Lengths(64, 64)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is run. Count and time are always bounded: ``requests``, ``time_limit_s``.

    With a ``rate`` (requests a second) the load is an open loop, else ``clients`` clients form a
    closed one. ``peft`` says whether PEFT's static batch is timed as well. ``targets`` are lower
    bounds of ratios in the report.
    """

    name: str
    summary: str
    shape: str = "100m"
    adapters: int = 8
    ranks: tuple[int, ...] = (16,)
    requests: int = 16
    popularity: Popularity = "distinct"
    zipf_exponent: float = 1.5
    prompt_tokens: Lengths = _SIXTY_FOUR
    output_tokens: Lengths = _SIXTY_FOUR
    clients: int = 16
    rate: float | None = None
    cv: float = 1.0
    repetitions: int = 3
    peft: bool = False
    time_limit_s: float = 1800.0
    targets: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("adapters", "requests", "clients", "repetitions", "time_limit_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be positive, got {self.ranks}")
        if self.cv <= 0 or (self.rate is not None and self.rate <= 0):
            raise ValueError(f"rate and cv must be positive, got {self.rate} and {self.cv}")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="mixed16x8",
            summary="16 requests at once over 8 adapters, against base-only and PEFT's batch",
            peft=True,
            targets={"manylora mixed / manylora base": 0.7, "manylora mixed / peft mixed": 1.5},
        ),
        Scenario(
            name="popularity",
            summary="many registered adapters, asked for by zipf's law, closed loop",
            shape="14m",
            adapters=64,
            ranks=(4, 8, 16),
            requests=96,
            popularity="zipf",
            prompt_tokens=Lengths(16, 128),
            output_tokens=Lengths(8, 64),
        ),
        Scenario(
            name="open-loop",
            summary="gamma-distributed arrivals, as in S-LoRA",
            shape="14m",
            adapters=16,
            ranks=(4, 8, 16),
            requests=60,
            popularity="uniform",
            prompt_tokens=Lengths(16, 128),
            output_tokens=Lengths(8, 64),
            rate=2.0,
        ),
    )
}
