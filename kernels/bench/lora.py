"""Times the native segmented low-rank product against the reference and the bytes it must read.

    python kernels/bench/lora.py --threads 2 --json result.json

``floor`` is the factors of the distinct adapters over the read bandwidth of the same run. A speed
is printed only if the result of the same call was right, compared with float64. Pools rotate
through more memory than the second-level caches hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from timing import ROTATED_BYTES, read_bandwidth, seconds

from manylora_kernels import (
    RankExtent,
    RankSegments,
    Segment,
    SegmentMap,
    lora_delta_,
    native,
    select_backend,
)

SHAPES = [(896, 896), (896, 4864), (4864, 896), (4096, 4096)]
# Name -> (tokens of each segment, ranks of the adapters in turn).
BATCHES = {
    "1 over 1, rank 16": ([1], [16]),
    "8 over 8, rank 16": ([1] * 8, [16]),
    "16 over 8, rank 16": ([2] * 8, [16]),
    "16 over 7, uneven, ranks 8 to 64": ([5, 1, 3, 1, 1, 4, 1], [8, 64, 16, 32]),
    "72 over 8, one prefill": ([64, 1, 1, 1, 1, 1, 1, 2], [16]),
    "512 over 4, uneven, rank 16": ([200, 7, 300, 5], [16]),
}


def batch(lengths: list[int], ranks: list[int]) -> tuple[RankSegments, int, int]:
    """Return the segments, the number of tokens and the rank rows."""
    extents: dict[int, RankExtent] = {}
    segments: list[Segment] = []
    row = token = 0
    for slot, length in enumerate(lengths):
        rank = ranks[slot % len(ranks)]
        extents[slot] = RankExtent(row, rank, 0.5)
        segments.append(Segment(token, token + length, slot))
        row += rank
        token += length
    runs = SegmentMap(segments, token).resolve(extents)
    assert runs is not None
    return runs, token, row


def wrong(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, runs: RankSegments) -> bool:
    """Whether the native product differs from float64 by more than rounding."""
    got = torch.zeros(x.shape[0], b.shape[1])
    lora_delta_(got, x, a, b, runs)
    expected = torch.zeros_like(got, dtype=torch.float64)
    for (start, end, first, last), weight in zip(
        runs.segments.tolist(), runs.weights.tolist(), strict=True
    ):
        projected = x[start:end].double() @ a[first:last].double().t()
        expected[start:end] += weight * projected @ b[first:last].double()
    return not torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.missing is not None:
        raise SystemExit(f"no native kernels: {native.missing}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{native.library.isa}, read bandwidth {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    print(f"{'in':>6}{'out':>6}  {'batch':34}{'us':>8}{'x floor':>9}{'x reference':>12}")
    rows = []
    for columns, outputs in SHAPES:
        for name, (lengths, ranks) in BATCHES.items():
            runs, tokens, rank_rows = batch(lengths, ranks)
            factor_bytes = rank_rows * (columns + outputs) * 4
            pools = [
                (torch.randn(rank_rows, columns) / 30, torch.randn(rank_rows, outputs))
                for _ in range(max(2, ROTATED_BYTES // factor_bytes))
            ]
            x, y = torch.randn(tokens, columns), torch.randn(tokens, outputs)
            times = {}
            for backend in ("native", "reference"):
                select_backend("lora_delta_", backend)
                if backend == "native" and wrong(x, *pools[0], runs):
                    raise SystemExit(f"{columns} to {outputs}, {name}: wrong, so no speed is given")
                times[backend] = seconds(
                    lambda i, x=x, y=y, runs=runs, pools=pools: lora_delta_(
                        y, x, *pools[i % len(pools)], runs
                    ),
                    options.rounds,
                )[0]
            floor = factor_bytes / bandwidth
            rows.append({"in": columns, "out": outputs, "batch": name, "floor_s": floor, **times})
            print(
                f"{columns:6}{outputs:6}  {name:34}{times['native'] * 1e6:8.1f}"
                f"{times['native'] / floor:9.2f}{times['reference'] / times['native']:12.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"read_bytes_per_s": bandwidth, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
