"""Times the native 4-bit linear against bitsandbytes' way, the dense product and memory.

    python kernels/bench/nf4_linear.py --threads 2 --json result.json
    python kernels/bench/nf4_linear.py --threads 2 --math int8

A shape's speed is printed only if its results passed in this process, immediately before: every
token count against float64, and one token alone equal to the same token among others. Matrices
are rotated through more copies than the last-level cache holds, as a model's layers are. A median
far above the best time means that something else was running: OpenMP waits for its slowest thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from timing import ROTATED_BYTES, read_bandwidth, seconds

from manylora_kernels import NF4Weight, native, nf4_linear, prepare_nf4, select_backend

BACKENDS = {"float32": native.NATIVE, "int8": native.NATIVE_INT8}
SHAPES = [(4096, 4096), (11008, 4096), (2048, 768), (768, 2048)]
TOKENS = [1, 4, 16, 128, 512]


def quantized(shape: tuple[int, int]) -> NF4Weight:
    """Return a random weight of ``shape`` in bitsandbytes' own layout."""
    packed, state = bnb.quantize_4bit(
        torch.randn(shape) / shape[1] ** 0.5, quant_type="nf4", compress_statistics=True
    )
    return NF4Weight(
        packed=packed,
        code=state.code,
        absmax=state.absmax,
        shape=shape,
        block_size=state.blocksize,
        absmax_code=state.state2.code,
        absmax_scale=state.state2.absmax,
        absmax_offset=float(state.offset),
        absmax_block_size=state.state2.blocksize,
    )


def copy_of(weight: NF4Weight) -> NF4Weight:
    """Return the same weight in memory of its own."""
    tensors = [tensor.clone() for tensor in weight.tensors]
    return NF4Weight.from_parts(tensors, weight.form, weight.absmax_offset, weight.shape[1])


def complaints(weight: NF4Weight, plain: NF4Weight, math: str) -> list[str]:
    """Return what is wrong with the results for ``weight``; timing needs an empty list."""
    # Of the sum of magnitudes. Eight bits round each activation by up to 1/254 of its block's
    # largest; over whole rows that averages out far below this.
    allowed = 4e-7 if math == "float32" else 1e-2
    found = []
    dense = plain.dequantize().double()
    x = torch.randn(max(TOKENS), weight.shape[1])
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    whole = nf4_linear(x, weight)
    for tokens in TOKENS:
        got = nf4_linear(x[:tokens], weight)
        error = float(((got.double() - expected[:tokens]).abs() / size[:tokens]).max())
        if not error < allowed:  # NaN is wrong too
            found.append(f"{tokens} tokens: error {error:.1e} of the sum of magnitudes")
        if not torch.equal(got, whole[:tokens]):
            found.append(f"{tokens} tokens: not the bits of the same tokens among {max(TOKENS)}")
    return found


def measure(shape: tuple[int, int], rounds: int, math: str) -> list[dict[str, float]]:
    """Return one row of figures for each number of tokens."""
    backend = BACKENDS[math]
    select_backend("nf4_linear", backend)
    plain = quantized(shape)
    weight = prepare_nf4(plain)
    wrong = complaints(weight, plain, math)
    if wrong:
        raise SystemExit(f"{shape}: no speed is given for wrong results:\n  " + "\n  ".join(wrong))
    copies = max(2, ROTATED_BYTES // weight.bytes)
    weights = [copy_of(weight) for _ in range(copies)]
    plains = [copy_of(plain) for _ in range(max(2, copies // 8))]
    denses = [plain.dequantize()]
    while len(denses) * shape[0] * shape[1] * 4 < ROTATED_BYTES:
        denses.append(denses[0].clone())
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1])
        times = {}
        for name, chosen in (("float32", native.NATIVE), ("native", backend)):
            select_backend("nf4_linear", chosen)
            times[name] = seconds(lambda i, x=x: nf4_linear(x, weights[i % len(weights)]), rounds)
        times["dense"] = seconds(lambda i, x=x: F.linear(x, denses[i % len(denses)]), rounds)
        select_backend("nf4_linear", "bitsandbytes")
        times["bitsandbytes"] = seconds(
            lambda i, x=x: nf4_linear(x, plains[i % len(plains)]), max(3, rounds // 4)
        )
        rows.append(
            {
                "out": shape[0],
                "in": shape[1],
                "tokens": tokens,
                "bytes": weight.bytes,
                **{f"{name}_s": median for name, (median, _) in times.items()},
                **{f"{name}_best_s": best for name, (_, best) in times.items()},
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", help="portable, avx2 or avx512; the best one if not given")
    parser.add_argument("--math", choices=sorted(BACKENDS), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.missing is not None:
        raise SystemExit(f"no native kernels: {native.missing}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.isa:
        native.library.select_isa(options.isa)
    select_backend("nf4_linear", native.NATIVE)
    bandwidth = read_bandwidth()
    print(
        f"{native.library.isa}, {options.math}, {options.threads} threads, "
        f"torch {torch.__version__}, read bandwidth {bandwidth / 1e9:.1f} GB/s",
        file=sys.stderr,
    )
    head = (
        "out",
        "in",
        "tokens",
        "ms",
        "GB/s",
        "of read",
        "GFLOP/s",
        "x bnb",
        "x dense",
        "x float",
        "best ms",
    )
    print("".join(f"{name:>9}" for name in head))
    rows = []
    for shape in SHAPES:
        for row in measure(shape, options.rounds, options.math):
            rate = row["bytes"] / row["native_s"]
            flops = 2 * row["tokens"] * row["out"] * row["in"] / row["native_s"]
            print(
                f"{row['out']:9}{row['in']:9}{row['tokens']:9}{row['native_s'] * 1e3:9.3f}"
                f"{rate / 1e9:9.2f}{rate / bandwidth:9.2f}{flops / 1e9:9.1f}"
                f"{row['bitsandbytes_s'] / row['native_s']:9.1f}"
                f"{row['dense_s'] / row['native_s']:9.2f}"
                f"{row['float32_s'] / row['native_s']:9.2f}{row['native_best_s'] * 1e3:9.3f}",
                flush=True,
            )
            rows.append(row)
    if options.json:
        result = {
            "isa": native.library.isa,
            "math": options.math,
            "threads": options.threads,
            "torch": torch.__version__,
            "read_bytes_per_s": bandwidth,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
