"""Runs one step's chunks through the model as one flattened batch."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import nn

from manylora_kernels import Segment, SegmentMap
from manylora_server.model.attention import KVCache, PagedAttention
from manylora_server.model.batch import Chunk
from manylora_server.model.context import ForwardContext, forward_context
from manylora_server.model.cuda_graphs import DecodeGraphs

if TYPE_CHECKING:
    from manylora_server.model.program.program import StepProgram

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedAttention, SegmentMap, SegmentMap]


class ModelRunner:
    """Owns the forward pass: chunks in, logits out.

    The batch is ordered so that sequences with one token (decode) come first, and within each
    half by adapter slots and weights, which makes the rows of every adapter or mix contiguous.
    """

    def __init__(
        self, model: nn.Module, cache: KVCache, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = model
        self.cache = cache
        # At most one of them: replays of decode steps on a GPU, or of any step on a CPU.
        self.graphs: DecodeGraphs | None = None
        self.program: StepProgram | None = None
        self._dtype = dtype
        self._device = device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Return float32 logits ``[n, vocab]``, a row per chunk with ``sample``, in order.

        They may lie in memory that the next call overwrites.
        """
        order, starts = _ordered(chunks)
        ordered = [chunks[i] for i in order]
        sampled = [i for i in order if chunks[i].sample]
        if self.graphs is not None:
            replayed = self.graphs.logits(ordered, _segments(ordered, starts))
            if replayed is not None:
                return self._as_given(replayed, sampled)
        inputs = self._inputs(ordered, starts)
        if self.program is not None:
            out = self.program.run(*inputs)
        else:
            out = self._without_program(*inputs)
        return self._finished(out, inputs[2], sampled)

    @torch.inference_mode()
    def logits_in_pieces(
        self, chunks: Sequence[Chunk], most: int
    ) -> Generator[None, None, torch.Tensor]:
        """Do what ``logits`` does, without graphs, and yield now and then.

        That is after every ``most`` instructions of the program, and never where there is none.
        """
        order, starts = _ordered(chunks)
        inputs = self._inputs([chunks[i] for i in order], starts)
        if self.program is not None:
            out = yield from self.program.in_pieces(*inputs, most)
        else:
            out = self._without_program(*inputs)
        return self._finished(out, inputs[2], [i for i in order if chunks[i].sample])

    def _inputs(self, ordered: Sequence[Chunk], starts: list[int]) -> _Inputs:
        """Return the step's tensors: as ``StepProgram.run`` takes them."""
        total = starts[-1]
        keep = [end - 1 for end, chunk in zip(starts[1:], ordered, strict=True) if chunk.sample]
        segments = self._map(_segments(ordered, starts), total)
        output_segments = segments
        if self._keeps_logits:
            outputs = [chunk for chunk in ordered if chunk.sample]
            output_rows = range(len(outputs) + 1)
            output_segments = self._map(_segments(outputs, output_rows), len(outputs))
        token_ids = [token for chunk in ordered for token in chunk.token_ids]
        positions = [
            position
            for chunk in ordered
            for position in range(chunk.start, chunk.start + len(chunk.token_ids))
        ]
        device = self._device
        return (
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(keep, dtype=torch.int64, device=device),
            self._attention(ordered, starts),
            segments,
            output_segments,
        )

    def _without_program(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        attention: PagedAttention,
        segments: SegmentMap,
        output_segments: SegmentMap,
    ) -> torch.Tensor:
        with forward_context(ForwardContext(attention, segments, output_segments)):
            return self._forward(ids[None], positions[None], rows)

    def _finished(self, out: torch.Tensor, rows: torch.Tensor, sampled: list[int]) -> torch.Tensor:
        if not self._keeps_logits:
            out = out[rows]
        return self._as_given(out, sampled).float()

    def _as_given(self, rows: torch.Tensor, sampled: list[int]) -> torch.Tensor:
        """Return ``rows`` of the chunks ``sampled`` in the order that the chunks were given in."""
        if sampled == sorted(sampled):
            return rows
        back = sorted(range(len(sampled)), key=lambda row: sampled[row])
        return rows[torch.tensor(back, device=self._device)]

    def record(self, modules: dict[str, nn.Module], head: str | None) -> StepProgram:
        """Return the model's pass as a program; ``NotRecordableError`` where that cannot be.

        See ``program.record_program`` for the arguments.
        """
        # Programs need the native library, which may not be there.
        from manylora_server.model.program.program import record_program

        return record_program(self.model, self._forward, modules, head)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        extra = {"logits_to_keep": rows} if self._keeps_logits else {}
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
        logits: torch.Tensor = out.logits[0]
        return logits

    def _map(self, segments: list[Segment], rows: int) -> SegmentMap:
        return SegmentMap(segments, rows, device=self._device, dtype=self._dtype)

    def _attention(self, ordered: Sequence[Chunk], starts: list[int]) -> PagedAttention:
        block_tokens = self.cache.block_tokens
        width = max(len(chunk.block_table) for chunk in ordered)
        places = [
            chunk.block_table[position // block_tokens] * block_tokens + position % block_tokens
            for chunk in ordered
            for position in range(chunk.start, chunk.start + len(chunk.token_ids))
        ]
        tables = [
            [*chunk.block_table, *([0] * (width - len(chunk.block_table)))] for chunk in ordered
        ]
        lengths = [chunk.start + len(chunk.token_ids) for chunk in ordered]
        device = self._device
        return PagedAttention(
            cache=self.cache,
            positions=torch.tensor(places, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            num_decodes=sum(len(chunk.token_ids) == 1 for chunk in ordered),
        )


def _ordered(chunks: Sequence[Chunk]) -> tuple[list[int], list[int]]:
    """Return the order in which to compute ``chunks``, and where each of them begins in it."""
    order = sorted(range(len(chunks)), key=lambda i: _place(chunks[i]))
    starts = [0, *accumulate(len(chunks[i].token_ids) for i in order)]
    return order, starts


def _place(chunk: Chunk) -> tuple[bool, tuple[tuple[int, float], ...]]:
    return (len(chunk.token_ids) > 1, chunk.adapters)


def _segments(ordered: Sequence[Chunk], starts: Sequence[int]) -> list[Segment]:
    """Return the segments of each run of neighbouring chunks that have the same adapters.

    One for each adapter, over the same rows and in the chunks' order; none for the base.
    """
    segments = []
    for adapters, run in groupby(range(len(ordered)), key=lambda i: ordered[i].adapters):
        indices = list(run)
        start, end = starts[indices[0]], starts[indices[-1] + 1]
        segments += [Segment(start, end, slot, weight) for slot, weight in adapters]
    return segments
