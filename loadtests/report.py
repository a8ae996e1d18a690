"""Numbers out of runs: throughput, percentiles, ratios; as JSON and as a small table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loadtests.client import Record

# Ratios of generated tokens a second, as (numerator, denominator).
_RATIOS = (
    ("manylora mixed", "manylora base"),
    ("manylora mixed", "peft mixed"),
    ("manylora base", "peft base"),
    ("peft mixed", "peft base"),
)
_PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Run:
    """One side's answer to one repetition. ``records`` is empty where only the whole is timed."""

    wall_s: float
    prompt_tokens: int
    tokens: list[list[int]]
    records: list[Record]

    @property
    def generated_per_s(self) -> float:
        """Generated tokens a second."""
        return sum(map(len, self.tokens)) / self.wall_s

    @property
    def total_per_s(self) -> float:
        """Prompt and generated tokens a second."""
        return (self.prompt_tokens + sum(map(len, self.tokens))) / self.wall_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile with linear interpolation between the two nearest values."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Return one side's figures: medians over repetitions, latencies over all their requests."""
    summary: dict[str, Any] = {
        "generated_tokens_per_s": median(run.generated_per_s for run in runs),
        "total_tokens_per_s": median(run.total_per_s for run in runs),
        "wall_s": [run.wall_s for run in runs],
    }
    records = [record for run in runs for record in run.records]
    if records:
        summary["time_to_first_token_s"] = _percentiles([r.first_token_s for r in records])
        gaps = [gap for record in records for gap in record.inter_token_s]
        if gaps:
            summary["inter_token_s"] = _percentiles(gaps)
        summary["cached_prompt_tokens"] = sum(record.cached_tokens for record in records)
    return summary


def ratios(
    sides: Mapping[str, Sequence[Run]], targets: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return each ratio of median throughputs, and that of every repetition by itself."""
    result: dict[str, dict[str, Any]] = {}
    for above, below in _RATIOS:
        if above not in sides or below not in sides:
            continue
        name = f"{above} / {below}"
        pairs = zip(sides[above], sides[below], strict=True)
        ratio = median(run.generated_per_s for run in sides[above]) / median(
            run.generated_per_s for run in sides[below]
        )
        result[name] = {
            "ratio": ratio,
            "by_repetition": [a.generated_per_s / b.generated_per_s for a, b in pairs],
        }
        if name in targets:
            result[name] |= {"target": targets[name], "met": ratio >= targets[name]}
    return result


def table(report: Mapping[str, Any]) -> str:
    """Return the figures for people. Latencies are in milliseconds."""
    checked, machine = report["verification"], report["machine"]
    lines = [
        f"{report['scenario']['name']}, base held as {report['quantization']}, "
        f"{report['model']['parameters']:,} parameters",
        f"{machine['cpu']}, {machine['usable_cores']} cores, "
        f"load {machine['load_average'][0]:.1f} before the run",
        f"tokens as PEFT's: {checked['equal']} of {checked['requests']} answers equal, "
        f"{len(checked['near_ties'])} near ties, {len(checked['mismatches'])} mismatches",
        "",
        f"{'':16}{'gen tok/s':>10}{'all tok/s':>10}"
        f"{'first token p50/95/99':>24}{'between tokens p50/95/99':>27}",
    ]
    for name, side in report["sides"].items():
        lines.append(
            f"{name:16}{side['generated_tokens_per_s']:>10.1f}{side['total_tokens_per_s']:>10.1f}"
            f"{_cell(side.get('time_to_first_token_s')):>24}{_cell(side.get('inter_token_s')):>27}"
        )
    lines.append("")
    for name, entry in report["ratios"].items():
        spread = entry["by_repetition"]
        line = f"{name}: {entry['ratio']:.2f} ({min(spread):.2f} to {max(spread):.2f})"
        if "target" in entry:
            line += f", target {entry['target']:.2f} {'met' if entry['met'] else 'NOT met'}"
        lines.append(line)
    return "\n".join(lines)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in _PERCENTILES}


def _cell(percentiles: Mapping[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return " / ".join(f"{1000 * value:.0f}" for value in percentiles.values())
