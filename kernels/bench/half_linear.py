"""Times the native linear with half-width weights against torch's products with float32 weights.

    python kernels/bench/half_linear.py --threads 2 --json result.json

A shape's speed is printed only if its results passed in this process, immediately before: every
token count against float64, and its bits against those of the same tokens among more. ``packed`` is
oneDNN's product with a weight in its own layout (the server's ``PackedLinear``), ``dense`` is
``F.linear``. Matrices are rotated through copies, as a model's layers are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import ROTATED_BYTES, product_rate, read_bandwidth, seconds

from manylora_kernels import HalfWeight, half_linear, native, select_backend
from manylora_kernels.half import DTYPES, narrow

SHAPES = [(151936, 896), (32000, 768), (4096, 4096), (2048, 768), (768, 2048), (896, 896)]
TOKENS = [1, 4, 8, 16, 64, 512]
# Products of more than this many multiplications are left out: they would take seconds each.
MOST_PRODUCTS = 1 << 34


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Return ``weight`` in oneDNN's layout."""
    result: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return result


def packed_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as ``PackedLinear`` does: oneDNN is slower with fewer than four rows."""
    padding = max(0, 4 - x.shape[0])
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def complaints(weight: HalfWeight, dense: torch.Tensor, tokens: list[int]) -> list[str]:
    """Return what is wrong with the results for ``weight``; timing needs an empty list."""
    found = []
    x = torch.randn(max(tokens), weight.shape[1])
    rows = torch.randperm(weight.shape[0])[:4096]
    wide = dense[rows].double()
    expected, size = x.double() @ wide.t(), x.double().abs() @ wide.abs().t()
    whole = half_linear(x, weight)
    for count in tokens:
        got = half_linear(x[:count], weight)
        error = float(((got[:, rows].double() - expected[:count]).abs() / size[:count]).max())
        if not error < 2e-6:  # NaN is wrong too
            found.append(f"{count} tokens: error {error:.1e} of the sum of magnitudes")
        if not torch.equal(got, whole[:count]):
            found.append(f"{count} tokens: not the bits of the same tokens among {max(tokens)}")
    return found


def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> list[dict[str, float]]:
    """Return one row of figures for each number of tokens."""
    out, columns = shape
    dense = (torch.randn(shape) / columns**0.5).to(dtype).float()
    weight = narrow(dense, dtype)
    tokens = [count for count in TOKENS if count * out * columns <= MOST_PRODUCTS]
    wrong = complaints(weight, dense, tokens)
    if wrong:
        raise SystemExit(f"{shape}: no speed is given for wrong results:\n  " + "\n  ".join(wrong))
    copies = max(1, ROTATED_BYTES // (2 * out * columns))
    halves = [weight, *(HalfWeight(weight.tiles.clone(), shape) for _ in range(copies - 1))]
    denses = [dense, *(dense.clone() for _ in range(max(1, copies // 2) - 1))]
    blocked = [packed(one) for one in denses]
    rows = []
    for count in tokens:
        x = torch.randn(count, columns)
        times = {
            "native": seconds(lambda i, x=x: half_linear(x, halves[i % len(halves)]), rounds),
            "packed": seconds(lambda i, x=x: packed_product(x, blocked[i % len(blocked)]), rounds),
            "dense": seconds(lambda i, x=x: F.linear(x, denses[i % len(denses)]), rounds),
        }
        rows.append(
            {
                "out": out,
                "in": columns,
                "tokens": count,
                "bytes": 2 * out * columns,
                **{f"{name}_s": median for name, (median, _) in times.items()},
                **{f"{name}_best_s": best for name, (_, best) in times.items()},
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", help="portable, avx2 or avx512; the best one if not given")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.missing is not None:
        raise SystemExit(f"no native kernels: {native.missing}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.isa:
        native.library.select_isa(options.isa)
    select_backend("half_linear", native.NATIVE)
    dtype = next(dtype for dtype in DTYPES if str(dtype).endswith(options.dtype))
    bandwidth, rate = read_bandwidth(), product_rate()
    print(
        f"{native.library.isa}, {options.dtype}, {options.threads} threads, torch "
        f"{torch.__version__}, read bandwidth {bandwidth / 1e9:.1f} GB/s, product "
        f"{rate / 1e9:.0f} GFLOP/s",
        file=sys.stderr,
    )
    head = "out in tokens ms GB/s of_read GFLOP/s of_product x_packed x_dense best_ms"
    print("".join(f"{name:>11}" for name in head.split()))
    rows = []
    for shape in SHAPES:
        for row in measure(shape, dtype, options.rounds):
            taken = row["native_s"]
            flops = 2 * row["tokens"] * row["out"] * row["in"] / taken
            print(
                f"{row['out']:11}{row['in']:11}{row['tokens']:11}{taken * 1e3:11.3f}"
                f"{row['bytes'] / taken / 1e9:11.2f}{row['bytes'] / taken / bandwidth:11.2f}"
                f"{flops / 1e9:11.1f}{flops / rate:11.2f}{row['packed_s'] / taken:11.2f}"
                f"{row['dense_s'] / taken:11.2f}{row['native_best_s'] * 1e3:11.3f}",
                flush=True,
            )
            rows.append(row)
    if options.json:
        result = {
            "isa": native.library.isa,
            "dtype": options.dtype,
            "threads": options.threads,
            "torch": torch.__version__,
            "read_bytes_per_s": bandwidth,
            "product_flops": rate,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
