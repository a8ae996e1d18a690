"""Times the native paged attention against the reference, and against what the machine can do.

    python kernels/bench/attention.py --threads 2 --json result.json

A speed is printed only if the result passed in this process, immediately before: against the
reference in float64, and every sequence alone, to the bit. Caches are rotated through copies as a
model's layers are. The floors: keys and values read once at the read bandwidth of a large sum, and
the multiplications of visible keys at the rate of torch's own matrix product.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import ROTATED_BYTES, product_rate, read_bandwidth, seconds

from manylora_kernels import native, paged_attention, select_backend

BLOCK_TOKENS = 16
HEADS = [(16, 4, 64), (32, 8, 128)]
DECODES = [(batch, context) for context in (128, 1024, 4096) for batch in (1, 8, 16)]
PREFILLS = [128, 512]


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``context`` positions, the last ``queries`` of which are computed."""

    heads: int
    kv_heads: int
    dim: int
    batch: int
    context: int
    queries: int

    @property
    def cache_bytes(self) -> int:
        """Keys and values of the sequences."""
        return 8 * self.batch * self.context * self.kv_heads * self.dim

    @property
    def operations(self) -> int:
        """Multiplications and additions of all pairs of a query and a key that it sees."""
        earlier = self.context - self.queries
        pairs = self.queries * earlier + self.queries * (self.queries + 1) // 2
        return 4 * self.batch * self.heads * self.dim * pairs


class Batch:
    """A case's tensors, its pages scattered over the cache."""

    def __init__(self, case: Case) -> None:
        self.case = case
        pages = -(-case.context // BLOCK_TOKENS)
        total = case.batch * pages + 1
        shape = (total, BLOCK_TOKENS, case.kv_heads, case.dim)
        copies = max(1, ROTATED_BYTES // case.cache_bytes)
        self.caches = [(torch.randn(shape), torch.randn(shape)) for _ in range(copies)]
        order = torch.randperm(total - 1) + 1
        self.tables = order.to(torch.int32).view(case.batch, pages)
        self.contexts = torch.full((case.batch,), case.context, dtype=torch.int32)
        self.starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.queries
        # As a model's own: transposed.
        self.q = torch.randn(case.heads, case.batch * case.queries, case.dim).transpose(0, 1)

    def run(self, index: int, sequence: int | None = None, double: bool = False) -> torch.Tensor:
        """Attend over copy ``index`` of the caches: the batch, or one of its sequences alone."""
        case, q = self.case, self.q
        tables, contexts, starts = self.tables, self.contexts, self.starts
        if sequence is not None:
            q = q[sequence * case.queries : (sequence + 1) * case.queries]
            tables, contexts = tables[sequence : sequence + 1], contexts[:1]
            starts = starts[:2]
        k_cache, v_cache = self.caches[index % len(self.caches)]
        if double:
            q, k_cache, v_cache = q.double(), k_cache.double(), v_cache.double()
        decodes = len(contexts) if case.queries == 1 else 0
        return paged_attention(
            q, k_cache, v_cache, tables, contexts, starts, decodes, case.dim**-0.5
        )


def complaints(batch: Batch) -> list[str]:
    """Return what is wrong with the native results; timing needs an empty list."""
    found = []
    select_backend("paged_attention", native.NATIVE)
    got = batch.run(0)
    alone = [batch.run(0, sequence) for sequence in range(batch.case.batch)]
    select_backend("paged_attention", "reference")
    # A sequence at a time: the whole in float64 would need much memory.
    for sequence, own in enumerate(got.split(batch.case.queries)):
        error = float((own.double() - batch.run(0, sequence, double=True)).abs().max())
        if not error < 4e-6:  # NaN is wrong too
            found.append(f"sequence {sequence}: error {error:.1e}")
        if not torch.equal(own, alone[sequence]):
            found.append(f"sequence {sequence}: not the bits that it gets alone")
    return found


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Return the figures of one case."""
    batch = Batch(case)
    wrong = complaints(batch)
    if wrong:
        raise SystemExit(f"{case}: no speed is given for wrong results:\n  " + "\n  ".join(wrong))
    select_backend("paged_attention", native.NATIVE)
    ours, best = seconds(batch.run, rounds)
    select_backend("paged_attention", "reference")
    theirs, _ = seconds(batch.run, max(3, rounds // 4))
    return {
        **case.__dict__,
        "native_s": ours,
        "native_best_s": best,
        "reference_s": theirs,
        "bytes": case.cache_bytes,
        "operations": case.operations,
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", help="portable, avx2 or avx512; the best one if not given")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if native.missing is not None:
        raise SystemExit(f"no native kernels: {native.missing}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.isa:
        native.library.select_isa(options.isa)
    bandwidth, rate = read_bandwidth(), product_rate()
    print(
        f"{native.library.isa}, {options.threads} threads, torch {torch.__version__}, read "
        f"bandwidth {bandwidth / 1e9:.1f} GB/s, product {rate / 1e9:.0f} GFLOP/s",
        file=sys.stderr,
    )
    cases = []
    for heads, kv_heads, dim in HEADS:
        if options.only != "prefill":
            cases += [Case(heads, kv_heads, dim, *sizes, queries=1) for sizes in DECODES]
        if options.only != "decode":
            cases += [Case(heads, kv_heads, dim, 1, length, length) for length in PREFILLS]
    head = "heads kv dim batch context queries us GB/s of_read GFLOP/s of_product x_ref best_us"
    print("".join(f"{name:>10}" for name in head.split()))
    rows = []
    for case in cases:
        row = measure(case, options.rounds)
        taken = row["native_s"]
        print(
            f"{case.heads:10}{case.kv_heads:10}{case.dim:10}{case.batch:10}{case.context:10}"
            f"{case.queries:10}{taken * 1e6:10.1f}{row['bytes'] / taken / 1e9:10.1f}"
            f"{row['bytes'] / taken / bandwidth:10.2f}{row['operations'] / taken / 1e9:10.1f}"
            f"{row['operations'] / taken / rate:10.2f}{row['reference_s'] / taken:10.2f}"
            f"{row['native_best_s'] * 1e6:10.1f}",
            flush=True,
        )
        rows.append(row)
    if options.json:
        result = {
            "isa": native.library.isa,
            "threads": options.threads,
            "torch": torch.__version__,
            "read_bytes_per_s": bandwidth,
            "product_flops": rate,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
