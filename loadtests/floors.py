"""``python -m loadtests.floors``: decode and prefill against the bytes that they must read.

One server, spoken to over HTTP, streaming: one client at a time for the step without company, then
``--clients`` at once over as many adapters, against the same load on the base in the same run. The
floor of a decode step is its weights (and the distinct adapters' factors) read once, at the read
bandwidth that a large sum reached just before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loadtests import machine
from loadtests.models import SHAPES, ModelShape, ensure_adapters, ensure_model
from loadtests.pair import Server, register, run_load, serving
from loadtests.report import Run
from loadtests.workload import Lengths, Request, WorkloadSpec, base_only, make_requests

_RESULTS = Path(__file__).resolve().parent / "results"
_NF4_BITS = 4.127
_HEAD_BYTES = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.floors", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="500m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cpu-math", choices=("float32", "int8"), default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--cache", type=Path, default=_RESULTS / "cache")
    options = parser.parse_args()
    result = {"machine": machine.describe(), **asyncio.run(_run(options))}
    path = _RESULTS / f"floors-{options.shape}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:44}{value:12.3f}")
    print(f"written to {path}", file=sys.stderr)
    return 0


async def _run(options: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[options.shape]
    model = ensure_model(shape, options.cache)
    adapters = ensure_adapters(model, options.clients, (options.rank,))
    names = [adapter.name for adapter in adapters]
    home = options.cache / f"home-floors-{options.shape}-{options.rank}"
    arguments = ["--cpu-math", options.cpu_math, "--adapter-slots", str(options.clients)]
    bandwidth = _read_bandwidth()
    async with serving(model, home, arguments, _RESULTS / "floors.log") as server:
        await register(server, adapters)
        for name in names:
            (await server.client.post(f"/admin/adapters/{name}/load")).raise_for_status()
        facts: dict[str, list[float]] = {}
        for repetition in range(options.repetitions + 1):
            measured = await _measure(server, shape, names, options, repetition)
            if repetition:  # the first one warms up
                for key, value in measured.items():
                    facts.setdefault(key, []).append(value)
    result: dict[str, Any] = {name: median(values) for name, values in facts.items()}
    result["by_repetition"] = facts
    result["read_gb_per_s"] = bandwidth / 1e9
    floor = _base_bytes(shape) / bandwidth
    result["floor_ms"] = 1e3 * floor
    result["decode_over_floor"] = result["decode_alone_ms"] / result["floor_ms"]
    result["mixed_over_base_decode"] = result["base_decode_ms"] / result["mixed_decode_ms"]
    result["mixed_over_base_throughput"] = (
        result["mixed_tokens_per_s"] / result["base_tokens_per_s"]
    )
    result["mixed_over_base_prefill"] = result["base_prefill_s"] / result["mixed_prefill_s"]
    return result


async def _measure(
    server: Server, shape: ModelShape, names: list[str], options: argparse.Namespace, seed: int
) -> dict[str, float]:
    def requests(count: int, prompt: int, output: int) -> list[Request]:
        spec = WorkloadSpec(
            count, shape.vocabulary, "distinct", Lengths(prompt, prompt), Lengths(output, output)
        )
        return make_requests(spec, names, seed=100 * seed + prompt)

    clients, output = options.clients, options.output_tokens
    alone = await run_load(server, base_only(requests(2, 16, output)), 1)
    prompt = await run_load(server, base_only(requests(4, 128, 1)), 1)
    mixed_load = requests(clients, 17, output)
    base = await run_load(server, base_only(mixed_load), clients)
    mixed = await run_load(server, mixed_load, clients)
    prompts = requests(clients, 129, 1)
    base_prefill = await run_load(server, base_only(prompts), clients)
    mixed_prefill = await run_load(server, prompts, clients)
    return {
        "decode_alone_ms": 1e3 * _gap(alone),
        "decode_alone_tokens_per_s": 1 / _gap(alone),
        "prompt_of_128_tokens_per_s": 128 / median(r.first_token_s for r in prompt.records),
        "base_decode_ms": 1e3 * _gap(base),
        "mixed_decode_ms": 1e3 * _gap(mixed),
        "base_tokens_per_s": base.generated_per_s,
        "mixed_tokens_per_s": mixed.generated_per_s,
        "base_prefill_s": base_prefill.wall_s,
        "mixed_prefill_s": mixed_prefill.wall_s,
    }


def _gap(run: Run) -> float:
    return median(gap for record in run.records for gap in record.inter_token_s)


def _base_bytes(shape: ModelShape) -> float:
    """Return the bytes of a step: the linear layers in 4 bits, the tied head in 16."""
    head = shape.vocabulary * shape.hidden
    norms = shape.hidden * (2 * shape.layers + 1)
    return (shape.parameters - head - norms) * _NF4_BITS / 8 + head * _HEAD_BYTES


def _read_bandwidth() -> float:
    array = torch.ones(64 * 1024**2)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - start)
    return array.numel() * 4 / median(times)


if __name__ == "__main__":
    sys.exit(main())
