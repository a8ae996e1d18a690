"""One step's work as the scheduler hands it to the model: no tensors yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step.

    ``token_ids`` are the tokens to compute, at positions ``start, start + 1, ...``;
    ``block_table`` holds the KV blocks of positions ``0`` to the chunk's last; ``adapters`` are the
    device slots whose adapters its rows add up, with their weights, in the order of summation
    (none: the base); ``sample`` says whether the logits after the last token are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    adapters: tuple[tuple[int, float], ...]
    sample: bool
