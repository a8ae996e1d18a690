"""``python -m loadtests.adapters registered|swap-cliff``: what many adapters cost.

``registered``: requests by a power law over 2,000 registered adapters against the same load over
16, on servers with 16 slots each. ``swap-cliff``: 16 adapters on 8 slots against 16 slots.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests import machine
from loadtests.models import SHAPES, ensure_adapters, ensure_model
from loadtests.pair import Server, Side, alternate, compared, register, run_load, serving
from loadtests.pair import names as registered_names
from loadtests.report import Run
from loadtests.workload import Lengths, Request, WorkloadSpec, make_requests

# Requests of equal length that start together end together, which no real ones do.
_UNEQUAL = Lengths(16, 112)
_RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.adapters", description=__doc__)
    parser.add_argument("scenario", choices=("registered", "swap-cliff"))
    parser.add_argument("--shape", choices=SHAPES, help="the model's size")
    parser.add_argument("--adapters", type=int, help="adapters registered")
    parser.add_argument("--rank", type=int, help="of every adapter")
    parser.add_argument("--slots", type=int, help="slots of the server in question")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=Lengths.parse)
    parser.add_argument("--output-tokens", type=Lengths.parse)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--zipf-exponent", type=float, default=1.0)
    parser.add_argument("--cache", type=Path, default=_RESULTS / "cache")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run = _registered if options.scenario == "registered" else _swap_cliff
    report = asyncio.run(run(options))
    report = {
        "scenario": options.scenario,
        "options": vars(options),
        "machine": machine.describe(),
        **report,
    }
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = _RESULTS / f"{options.scenario}-{stamp}.json"
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(_table(report))
    print(f"written to {path}", file=sys.stderr)
    return 0


async def _swap_cliff(options: argparse.Namespace) -> dict[str, Any]:
    shape = options.shape or "100m"
    count = options.adapters or 16
    slots = options.slots or 8
    model = ensure_model(SHAPES[shape], options.cache)
    adapters = ensure_adapters(model, count, (options.rank or 16,))
    names = [adapter.name for adapter in adapters]
    home = options.cache / f"home-swap-{shape}-{options.rank or 16}"

    def requests(repetition: int) -> list[Request]:
        return _requests(options, shape, names, "distinct", Lengths(64, 64), repetition)

    few, many = f"{slots} slots", f"{count} slots"
    base = ["--quantization", options.quantization, "--adapter-slots"]
    async with serving(model, home, [*base, str(count)], _log("many")) as wide:
        await register(wide, adapters)
        async with serving(model, home, [*base, str(slots)], _log("few")) as narrow:

            async def run_few(repetition: int) -> Run:
                return await run_load(narrow, requests(repetition), options.clients)

            async def run_many(repetition: int) -> Run:
                return await run_load(wide, requests(repetition), options.clients)

            runs = await alternate({few: run_few, many: run_many}, options.repetitions)
    return {"shape": shape, **compared(runs, few)}


async def _registered(options: argparse.Namespace) -> dict[str, Any]:
    shape = options.shape or "14m"
    count = options.adapters or 2000
    slots = ["--quantization", options.quantization, "--adapter-slots", str(options.slots or 16)]
    model = ensure_model(SHAPES[shape], options.cache)
    adapters = ensure_adapters(model, count, (options.rank or 4,))
    names = [adapter.name for adapter in adapters]
    home, small_home = (options.cache / f"home-{n}-{shape}" for n in (count, 16))
    register_s = []
    for folder, some in ((home, adapters), (small_home, adapters[:16])):
        async with serving(model, folder, slots, _log("register")) as server:
            register_s.append(await register(server, some))
    async with (
        serving(model, small_home, slots, _log("small")) as small,
        serving(model, home, slots, _log("large")) as large,
    ):
        facts = {
            "registered": count,
            "seconds_per_registration": register_s[0],
            "start_s": large.start_s,
            "start_with_16_s": small.start_s,
            **await _footprint(large, small, count),
        }

        def side(server: Server, some: Sequence[str], popularity: str) -> Side:
            async def run(repetition: int) -> Run:
                requests = _requests(options, shape, some, popularity, _UNEQUAL, repetition)
                return await run_load(server, requests, options.clients)

            return run

        above = f"{count} registered"
        sides = {
            above: side(large, names, "zipf"),
            "16 registered": side(small, names[:16], "zipf"),
            # As many different adapters in a batch as there can be, without a load in between.
            "16 in turn": side(small, names[:16], "distinct"),
        }
        runs = await alternate(sides, options.repetitions)
        facts["stats"] = await large.stats()
    return {"shape": shape, "facts": facts, **compared(runs, above)}


async def _footprint(large: Server, small: Server, count: int) -> dict[str, Any]:
    """Return the time to list all adapters and the memory that one costs while it is unloaded."""
    start = time.perf_counter()
    listed = len(await registered_names(large))
    seconds = time.perf_counter() - start
    if listed != count:
        raise RuntimeError(f"{count} adapters are registered and {listed} were listed")
    # The same calls, so that both have the same code and caches in memory.
    await registered_names(small)
    rss = [(await server.stats())["process"]["rss_bytes"] for server in (large, small)]
    return {
        "list_all_s": seconds,
        "rss_bytes": rss[0],
        "rss_with_16_bytes": rss[1],
        "bytes_per_unloaded_adapter": (rss[0] - rss[1]) / (count - 16),
    }


def _requests(
    options: argparse.Namespace,
    shape: str,
    names: Sequence[str],
    popularity: Any,
    lengths: Lengths,
    repetition: int,
) -> list[Request]:
    spec = WorkloadSpec(
        requests=options.requests,
        vocabulary=SHAPES[shape].vocabulary,
        popularity=popularity,
        zipf_exponent=options.zipf_exponent,
        prompt_tokens=options.prompt_tokens or lengths,
        output_tokens=options.output_tokens or lengths,
    )
    return make_requests(spec, names, seed=repetition)


def _log(name: str) -> Path:
    return _RESULTS / "adapters-logs" / f"{name}.log"


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['scenario']}, {report['shape']}, {report['machine']['cpu']}, "
        f"{report['machine']['usable_cores']} cores"
    ]
    for name, side in report["sides"].items():
        first = " / ".join(f"{1000 * v:.0f}" for v in side["time_to_first_token_s"].values())
        gaps = " / ".join(f"{1000 * v:.0f}" for v in side["inter_token_s"].values())
        lines.append(
            f"{name:18}{side['generated_tokens_per_s']:8.1f} tok/s, first token ms p50/95/99 "
            f"{first}, between tokens {gaps}"
        )
    for name, entry in report["ratios"].items():
        spread = entry["by_repetition"]
        lines.append(f"{name}: {entry['ratio']:.2f} ({min(spread):.2f} to {max(spread):.2f})")
    for name, value in report.get("facts", {}).items():
        if isinstance(value, int | float):
            lines.append(
                f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value:,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
