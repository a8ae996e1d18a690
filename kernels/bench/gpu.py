"""Times the Triton kernels against what the card can copy: the floor of reading each byte once.

    python kernels/bench/gpu.py --json result.json

A speed is given only for a kernel whose result in this process was right, compared with float64,
and the exit code is 1 if one was not. Inputs rotate through more memory than the card's caches
hold; times are of graph replays, so without launch gaps, which a server's decode steps lack too.
``--dry-run`` goes through everything once at tiny sizes, in Triton's interpreter where there is no
GPU, and gives no speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_step import Model, Shape
from gpu_timing import copies, copy_bandwidth, seconds
from gpu_weights import copy_of, random_nf4

from manylora_kernels import (
    RankExtent,
    RankSegments,
    Segment,
    SegmentMap,
    gpu,
    lora_delta_,
    nf4_linear,
    select_backend,
)

Row = dict[str, Any]
DTYPE = torch.bfloat16


class Bench:
    """The card, its copy bandwidth and what came out so far."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bandwidth = 0.0 if dry else copy_bandwidth()
        self.rows: list[Row] = []

    def report(self, row: Row, calls: list[Any], floor_bytes: int, wrong: str | None) -> None:
        """Time ``calls`` unless they are ``wrong``; print and keep the row."""
        if wrong is not None:
            row["wrong"] = wrong
        elif not self.dry:
            row["s"], row["best_s"] = seconds(calls)
            row["floor_s"] = floor_bytes / self.bandwidth
            row["over_floor"] = row["s"] / row["floor_s"]
        row["bytes"] = floor_bytes
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def random(self, *size: int) -> torch.Tensor:
        """Return random values on the card."""
        return torch.randn(size, device=self.device, dtype=DTYPE)


def complaint(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> str | None:
    """Return what is wrong: more than two roundings of what was summed. NaN is wrong too."""
    error = ((got.double() - expected).abs() / (size + 1e-30)).max()
    limit = 2 * torch.finfo(got.dtype).eps
    return None if float(error) <= limit else f"error {float(error):.1e}, allowed {limit:.1e}"


def nf4(bench: Bench) -> None:
    """4-bit linear layers, at the shapes of an 8B model; the same bits alone and in company."""
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    tokens = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]
    if bench.dry:
        shapes, tokens = [(70, 192)], [1, 66]
    for shape in shapes:
        weight = random_nf4(shape, bench.device)
        dense = weight.dequantize().double()
        x = bench.random(max(tokens), shape[1])
        whole = nf4_linear(x, weight)
        expected, size = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
        others = [weight, *[copy_of(weight) for _ in range(copies(weight.bytes) - 1)]]
        for count in tokens:
            part = x[:count]
            got = nf4_linear(part, weight)
            wrong = complaint(got, expected[:count], size[:count])
            if wrong is None and not torch.equal(got, whole[:count]):
                wrong = f"not the bits of the same tokens among {max(tokens)}"
            row: Row = {"kernel": "nf4_linear", "out": shape[0], "in": shape[1], "tokens": count}
            calls = [lambda part=part, w=w: nf4_linear(part, w) for w in others]
            moved = weight.bytes + part.numel() * 2 + count * shape[0] * 2
            bench.report(row, calls, moved, wrong)
            if "s" in row:
                row["tflops"] = 2 * count * shape[0] * shape[1] / row["s"] / 1e12


def batch(
    bench: Bench, tokens: int, adapters: int, ranks: list[int]
) -> tuple[RankSegments, dict[int, RankExtent], list[Segment]]:
    """Return ``tokens`` spread over ``adapters`` whose ranks take turns."""
    extents, segments, row = {}, [], 0
    for slot in range(adapters):
        rank = ranks[slot % len(ranks)]
        extents[slot] = RankExtent(row, rank, 0.5)
        row += rank
        start, end = slot * tokens // adapters, (slot + 1) * tokens // adapters
        segments.append(Segment(start, end, slot))
    runs = SegmentMap(segments, tokens, device=bench.device, dtype=DTYPE).resolve(extents)
    assert runs is not None
    return runs, extents, segments


def lora(bench: Bench) -> None:
    """Segmented low-rank products: 1 to 256 tokens over 1 to 64 adapters, ranks 8 to 64."""
    shapes: list[tuple[int, int]] = [(4096, 4096), (14336, 4096), (4096, 14336)]
    sizes = [(t, n) for t in (1, 4, 16, 32, 64, 256) for n in (1, 4, 16, 64) if n <= t]
    mixtures = [[8], [16], [64], [8, 64, 16, 32]]
    if bench.dry:
        shapes, sizes, mixtures = [(70, 192)], [(1, 1), (20, 3)], [[8, 20]]
    for (out, columns), (tokens, adapters), ranks in itertools.product(shapes, sizes, mixtures):
        runs, extents, segments = batch(bench, tokens, adapters, ranks)
        rows = sum(extent.rank for extent in extents.values())
        a, b = bench.random(rows, columns) / columns**0.5, bench.random(rows, out)
        x, y = bench.random(tokens, columns), bench.random(tokens, out)
        expected, size = y.double(), y.double().abs()
        for start, end, slot, _ in segments:
            own = slice(extents[slot].start, extents[slot].start + extents[slot].rank)
            part, a64, b64 = x[start:end].double(), a[own].double(), b[own].double()
            expected[start:end] += 0.5 * (part @ a64.t()) @ b64
            size[start:end] += 0.5 * (part.abs() @ a64.abs().t()) @ b64.abs()
        got = y.clone()
        lora_delta_(got, x, a, b, runs)
        pool_bytes = (a.numel() + b.numel()) * 2
        others = [(a, b), *[(a.clone(), b.clone()) for _ in range(copies(pool_bytes) - 1)]]
        calls = [lambda p=p, y=y, x=x, r=runs: lora_delta_(y, x, *p, r) for p in others]
        row = {
            "kernel": "lora_delta_",
            "out": out,
            "in": columns,
            "tokens": tokens,
            "adapters": adapters,
            "ranks": ranks,
        }
        moved = pool_bytes + (x.numel() + 2 * y.numel()) * 2
        bench.report(row, calls, moved, complaint(got, expected, size))


def step(bench: Bench) -> None:
    """A decode step of an 8B-shaped model: 32 requests on the base, and on 32 adapters."""
    shape, requests, context = Shape(), 32, 512
    if bench.dry:
        shape, requests, context = Shape(1, 64, 4, 2, 16, 96, 50), 3, 20
    model = Model(shape, requests, context, 16, bench.device, DTYPE)
    runs = model.runs()
    base = model.step(None)
    mixed = model.step(runs)
    for name, given, got in (("base", None, base), ("mixed", runs, mixed)):
        select("reference")
        expected = model.step(given)
        select(gpu.TRITON)
        # Many layers of bfloat16: only a gross mistake shows here; the kernels were checked above.
        error = float((got - expected).float().norm() / expected.float().norm())
        wrong = None if error <= 0.05 else f"logits differ by {error:.1e} of their norm"
        row = {"kernel": "decode step", "batch": name, "requests": requests, "context": context}
        calls = [lambda given=given: model.step(given)]
        bench.report(row, calls, model.bytes(given is not None), wrong)
    times = [row["s"] for row in bench.rows[-2:] if "s" in row]
    if len(times) == 2:
        bench.rows.append({"kernel": "decode step", "mixed over base": times[1] / times[0]})
        print(json.dumps(bench.rows[-1]))


def select(backend: str) -> None:
    """Let ``backend`` compute everything."""
    for operation in gpu.OPERATIONS:
        select_backend(operation, backend)


def main() -> None:
    """Measure, print a line for each result, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["nf4", "lora", "step"])
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run goes through without one")
    reason = gpu.load()
    if reason is not None:
        raise SystemExit(f"no Triton kernels: {reason}")
    select(gpu.TRITON)
    torch.manual_seed(0)
    bench = Bench(options.dry_run)
    result = {
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": bench.bandwidth,
        "rows": bench.rows,
    }
    for name, part in (("nf4", nf4), ("lora", lora), ("step", step)):
        if options.only in (None, name):
            with torch.inference_mode():
                part(bench)
            # What is measured so far stays measured if the next part fails.
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    if any("wrong" in row for row in bench.rows):
        sys.exit("some results were wrong; no speed is given for them")


if __name__ == "__main__":
    main()
