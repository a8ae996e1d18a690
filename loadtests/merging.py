"""``python -m loadtests.merging``: what a merge costs while requests run, and what it brings.

First the throughput of the base, of an adapter, and of the same adapter merged, at 1, 4 and 16
requests at once; whether a step uses the twin is the server's own choice. Then long answers are
streamed while the adapter is merged and unmerged, and the gaps between their tokens are told apart
by when they were: before, during the merge, after it, around the unmerge, after that.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests import machine
from loadtests.client import Record, complete
from loadtests.models import SHAPES, ModelShape, ensure_adapters, ensure_model
from loadtests.pair import Server, register, run_load, serving
from loadtests.report import Run, percentile
from loadtests.workload import Lengths, Request, WorkloadSpec, base_only, make_requests

_RESULTS = Path(__file__).resolve().parent / "results"
_BATCHES = (1, 4, 16)
# An unmerge is over at once; what it could do to the steps around it shows within this.
_AROUND_S = 1.0
_ANSWER = 600
_SETTLE_S = 12.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.merging", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="303m")
    parser.add_argument("--quantization", choices=("none", "nf4"), default="nf4")
    parser.add_argument("--precision", choices=("bf16", "int8", "nf4"), default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=4, help="streams during the merge")
    parser.add_argument("--others", type=int, default=1, help="of these, for another adapter")
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--window-s", type=float, default=6.0, help="before and after")
    parser.add_argument("--skip", choices=("throughput", "latency"), help="leave this out")
    parser.add_argument("--cache", type=Path, default=_RESULTS / "cache")
    parser.add_argument("--home", type=Path, help="(default: in the cache)")
    options = parser.parse_args()
    result = {"machine": machine.describe(), "options": vars(options)}
    result |= asyncio.run(_run(options))
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"merging-{options.shape}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(_table(result))
    print(f"written to {path}", file=sys.stderr)
    return 0


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[options.shape]
    model = ensure_model(shape, options.cache)
    adapters = ensure_adapters(model, 2, (options.rank,))
    home = options.home or options.cache / f"home-merging-{options.shape}-{options.rank}"
    arguments = ["--quantization", options.quantization, "--merge-memory", "64GiB"]
    async with serving(model, home, arguments, _RESULTS / "merging.log") as server:
        await register(server, adapters)
        name, other = (adapter.name for adapter in adapters)
        for loaded in (name, other):
            await _post(server, loaded, "load")
        result: dict[str, Any] = {}
        if options.skip != "throughput":
            result["throughput"] = await _throughput(server, shape, name, options)
        if options.skip != "latency":
            result["latency"] = await _latency(server, shape, name, other, options)
        return result


async def _throughput(
    server: Server, shape: ModelShape, name: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return generated tokens a second of the base, the adapter and its twin, in turns."""
    rates: dict[str, dict[str, list[float]]] = {}
    steps: dict[str, float] = {}
    record: dict[str, Any] = {}

    async def measure(side: str, repetition: int) -> None:
        for batch in _BATCHES:
            load = _requests(shape, name, batch, options.output_tokens, (repetition, batch, side))
            before = await _merged_steps(server)
            run = await run_load(server, base_only(load) if side == "base" else load, batch)
            used = (await _merged_steps(server)) - before
            if side == "merged":
                steps[str(batch)] = used / (options.output_tokens + 1)
            if repetition:  # the first one warms up
                rates.setdefault(side, {}).setdefault(str(batch), []).append(_decode_rate(run))

    for repetition in range(options.repetitions + 1):
        await measure("base", repetition)
        await measure("fused", repetition)
        body = {"precision": options.precision, "force": True}
        record = await _post(server, name, "merge", body)
        await measure("merged", repetition)
        await _post(server, name, "unmerge")
    return {
        "generated_tokens_per_s": rates,
        "share_of_steps_on_the_twin": steps,
        "twin": record["twin"],
    }


async def _latency(
    server: Server, shape: ModelShape, name: str, other: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return percentiles of the gaps between tokens, by when they were."""
    marks: dict[str, tuple[float, float]] = {}
    ends = asyncio.Event()
    records: list[Record] = []

    async def stream(index: int) -> None:
        number = itertools.count()
        chosen = other if index < options.others else name
        # So long that steps with a new prompt in them are fewer than one in a hundred, and begun at
        # different times, so that the contexts' mean length stays as it is.
        length = _ANSWER * (index + 1) // options.clients
        while not ends.is_set():
            seed = ("latency", index, next(number))
            (request,) = _requests(shape, chosen, 1, length, seed)
            length = _ANSWER
            records.append(await complete(server.client, request, time.perf_counter()))

    async def mark(what: str, since: float) -> None:
        marks[what] = (since, time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for index in range(options.clients):
            group.create_task(stream(index))
        await asyncio.sleep(_SETTLE_S)
        start = time.perf_counter()
        await asyncio.sleep(options.window_s)
        await mark("before", start)
        start = time.perf_counter()
        body = {"precision": options.precision, "force": True}
        twin = (await _post(server, name, "merge", body))["twin"]
        await mark("during the merge", start)
        start = time.perf_counter()
        await asyncio.sleep(options.window_s)
        await mark("merged", start)
        start = time.perf_counter()
        await _post(server, name, "unmerge")
        await asyncio.sleep(_AROUND_S)
        await mark("around the unmerge", start)
        start = time.perf_counter()
        await asyncio.sleep(options.window_s)
        await mark("after", start)
        ends.set()
    phases = {what: _gaps(records, *span) for what, span in marks.items()}
    before = percentile(phases["before"], 99)
    return {
        "merge_s": marks["during the merge"][1] - marks["during the merge"][0],
        "twin": twin,
        "phases": {
            what: {
                "tokens": len(gaps),
                **{f"p{p}": percentile(gaps, p) for p in (50, 99)},
                "largest": max(gaps),
                "p99_over_before": percentile(gaps, 99) / before,
            }
            for what, gaps in phases.items()
        },
    }


def _gaps(records: Sequence[Record], start: float, end: float) -> list[float]:
    """Return the gaps between tokens that end in the span."""
    return [
        b - a
        for record in records
        for a, b in itertools.pairwise(record.token_times)
        if start <= b <= end
    ]


def _decode_rate(run: Run) -> float:
    """Return tokens a second from the last first token to the first last one."""
    start = max(record.token_times[0] for record in run.records)
    end = min(record.token_times[-1] for record in run.records)
    times = [t for record in run.records for t in record.token_times if start < t <= end]
    return len(times) / (end - start)


def _requests(shape: ModelShape, name: str, count: int, output: int, seed: object) -> list[Request]:
    spec = WorkloadSpec(
        count, shape.vocabulary, "identical", Lengths(16, 16), Lengths(output, output)
    )
    return make_requests(spec, [name], seed=abs(hash(str(seed))) % 2**32)


async def _merged_steps(server: Server) -> int:
    stats = await server.stats()
    return int(stats["merging"]["merged_steps"])


async def _post(
    server: Server, name: str, action: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    response = await server.client.post(f"/admin/adapters/{name}/{action}", json=body)
    response.raise_for_status()
    record: dict[str, Any] = response.json()
    return record


def _table(result: dict[str, Any]) -> str:
    lines = []
    throughput = result.get("throughput")
    if throughput:
        rates = throughput["generated_tokens_per_s"]
        for batch in map(str, _BATCHES):
            cells = [
                f"{side} {sorted(of[batch])[len(of[batch]) // 2]:8.1f}"
                for side, of in rates.items()
            ]
            share = throughput["share_of_steps_on_the_twin"][batch]
            lines.append(f"batch {batch:>2}: {', '.join(cells)} tok/s; on the twin {share:.2f}")
        lines.append(f"twin: {_twin_line(throughput['twin'])}")
    latency = result.get("latency")
    if latency:
        lines.append(f"merge took {latency['merge_s']:.1f} s; {_twin_line(latency['twin'])}")
        for what, phase in latency["phases"].items():
            lines.append(
                f"{what:20}{phase['tokens']:6} tokens, ms p50/p99/largest "
                f"{1e3 * phase['p50']:.1f} / {1e3 * phase['p99']:.1f} / "
                f"{1e3 * phase['largest']:.1f}, p99 over before {phase['p99_over_before']:.2f}"
            )
    return "\n".join(lines)


def _twin_line(twin: dict[str, Any]) -> str:
    times = twin["step_times"]
    return (
        f"{twin['bytes'] / 2**20:.1f} MiB, {twin['delta_share']:.4f} of the change, KL "
        f"{twin['error']['kl_divergence']:.2e}; fused ms {times['fused_ms']}, merged ms "
        f"{times['merged_ms']}"
    )


if __name__ == "__main__":
    sys.exit(main())
