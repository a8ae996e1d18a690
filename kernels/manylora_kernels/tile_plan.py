"""Segments cut into the pieces that the segmented low-rank kernels of a GPU take, as tables.

Tokens are cut at every end of a segment, and every ``CELL_TOKENS`` tokens, into *cells*: all tokens
of a cell are in the same segments. A cell has one *item* for every ``ITEM_RANKS`` rank rows of each
of its segments, in the order of the segments. Shrinking computes the items independently;
expanding computes the cells independently, each as the sum of its items in order. So every token
is written once, by one program, and its sum has one order, whoever else is in the batch. Tokens of
the base are in no cell.

The tables are a function of the segments and of the layout of rank rows alone, so one serves all
modules of a step that share a layout. Reference: Punica (arXiv:2310.18547), S-LoRA
(arXiv:2311.03285).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

# One matrix instruction's worth of tokens and of rank rows; rows beyond an item's own are masked,
# neither read nor written.
CELL_TOKENS = 16
ITEM_RANKS = 16
COLUMNS = 5

Run = tuple[int, int, int, int, float]
Row = tuple[int, int, int, int, int]


class TilePlan(NamedTuple):
    """Both tables, int32 ``[rows, 5]``, on the device of the pools.

    ``items``: first token, tokens, first rank row, rank rows, the bits of the float32 weight.
    ``cells``: first token, tokens, first item, items, 0. A row of zeros is padding: nothing is
    computed for it.
    """

    items: torch.Tensor
    cells: torch.Tensor


def build(runs: Sequence[Run], device: torch.device) -> TilePlan:
    """Return the tables of ``runs``, (token start, token end, row start, row end, weight) each."""
    items, cells = cut(runs)
    return split(upload([*items, *cells], device), len(items))


def cut(runs: Sequence[Run]) -> tuple[list[Row], list[Row]]:
    """Return the rows of ``items`` and of ``cells``."""
    runs = [run for run in runs if run[0] < run[1] and run[2] < run[3]]
    bits = float_bits([run[4] for run in runs])
    starting: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for index, run in enumerate(runs):
        starting.setdefault(run[0], []).append(index)
        ending.setdefault(run[1], []).append(index)
    items: list[Row] = []
    cells: list[Row] = []
    covering: set[int] = set()
    for start, end in pairwise(sorted({*starting, *ending})):
        covering.difference_update(ending.get(start, ()))
        covering.update(starting.get(start, ()))
        if not covering:
            continue
        order = sorted(covering)
        for token in range(start, end, CELL_TOKENS):
            count, first_item = min(CELL_TOKENS, end - token), len(items)
            for index in order:
                _, _, first, last, _ = runs[index]
                items += [
                    (token, count, row, min(ITEM_RANKS, last - row), bits[index])
                    for row in range(first, last, ITEM_RANKS)
                ]
            cells.append((token, count, first_item, len(items) - first_item, 0))
    return items, cells


def split(table: torch.Tensor, items: int) -> TilePlan:
    """Return the plan whose first ``items`` rows of ``table`` are items and the others cells."""
    return TilePlan(table[:items], table[items:])


def upload(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Return ``rows`` as an int32 matrix on ``device``, without waiting for what runs there."""
    table = torch.tensor(rows, dtype=torch.int32)
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def float_bits(values: Sequence[float]) -> list[int]:
    """Return the bits of each value as float32, for tables of integers."""
    bits: list[int] = torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()
    return bits
