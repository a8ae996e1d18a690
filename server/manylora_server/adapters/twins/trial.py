"""Passes of the served path and of a twin, in pieces between steps: compared, and timed."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import fmean, median

import torch

from manylora_kernels import nf4_linear_in_float
from manylora_server.adapters.canary import CHUNKS, canary_prompts
from manylora_server.adapters.receipt import divergence
from manylora_server.adapters.twins.record import TwinError
from manylora_server.adapters.twins.step_times import PathChoice, StepTimes
from manylora_server.model.attention import KVCache, LayerShape
from manylora_server.model.batch import Chunk
from manylora_server.model.runner import ModelRunner

# Numbers of tokens that are timed.
_TIMED_TOKENS = (1, 2, 4, 8, 16, 48)
# Where a pass is one piece, whatever its size, the largest ones would be felt.
_UNCUT_TOKENS = (1, 4, 16)
# Each is timed so often on each path, in turns, after once without; the median counts.
_TIMES = 3
_MOST_LOGITS = 4

_BLOCK_TOKENS = 4
_BLOCKS = -(-sum(CHUNKS) // _BLOCK_TOKENS)
# The share of a pass of a token or a few that one piece is.
_PIECE_SHARE = 0.15
_TOKENS_FOR_FREE = 4

Pieces = Generator[None, None, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Trial:
    """The two paths: ``fused``, the base with the adapter in ``slot``, and the ``twin``.

    Both runners have a ``trial_cache`` for a cache, and memory that no step touches. All its
    methods belong between steps, and yield where a step may come between.
    """

    fused: ModelRunner
    twin: ModelRunner
    slot: int
    vocab_size: int
    device: torch.device

    def compare(self) -> Generator[None, None, TwinError]:
        """Run the canary prompts on both paths, a chunk of each prompt at a time."""
        prompts = canary_prompts(self.vocab_size)
        rows: list[tuple[float, float, bool]] = []
        for start, end in pairwise(accumulate(CHUNKS, initial=0)):
            chunks = [
                Chunk(prompt[start:end], start, _table(index, _BLOCKS), self._adapters, True)
                for index, prompt in enumerate(prompts)
            ]
            fused = yield from _in_float(self._run(self.fused, chunks))
            expected = fused.to("cpu", copy=True)
            yield
            twin = yield from _in_float(self._run(self.twin, chunks))
            got = twin.to("cpu", copy=True)
            for pair in zip(expected, got, strict=True):
                yield
                rows.append(_differences(*pair))
        kl = [row[0] for row in rows]
        relative = [row[1] for row in rows]
        return TwinError(
            positions=len(rows),
            kl_divergence=fmean(kl),
            largest_kl_divergence=max(kl),
            relative_logit_error=median(relative),
            largest_relative_logit_error=max(relative),
            top_token_agreement=fmean(row[2] for row in rows),
        )

    def calibrate(self) -> Generator[None, None, PathChoice]:
        """Time both paths by number of tokens, in turns."""
        fused: dict[int, float] = {}
        merged: dict[int, float] = {}
        for tokens in _TIMED_TOKENS if self._cut else _UNCUT_TOKENS:
            chunks = [
                Chunk(
                    [index % self.vocab_size],
                    0,
                    _table(index, 1),
                    self._adapters,
                    index < _MOST_LOGITS,
                )
                for index in range(tokens)
            ]
            taken: tuple[list[float], list[float]] = ([], [])
            for repetition in range(_TIMES + 1):
                for runner, values in zip((self.fused, self.twin), taken, strict=True):
                    seconds = yield from self._timed(runner, chunks)
                    if repetition:  # the first lays out memory
                        values.append(seconds)
            fused[tokens], merged[tokens] = map(median, taken)
        return PathChoice(StepTimes(fused), StepTimes(merged))

    @property
    def _adapters(self) -> tuple[tuple[int, float], ...]:
        return ((self.slot, 1.0),)

    @property
    def _cut(self) -> bool:
        return self.fused.program is not None

    def _timed(self, runner: ModelRunner, chunks: Sequence[Chunk]) -> Generator[None, None, float]:
        pieces = self._run(runner, chunks)
        total, done = 0.0, False
        while not done:
            begun = time.perf_counter()
            done = next(pieces, _DONE) is _DONE
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            total += time.perf_counter() - begun
            yield
        return total

    def _run(self, runner: ModelRunner, chunks: Sequence[Chunk]) -> Pieces:
        if runner is self.twin:
            chunks = [replace(chunk, adapters=()) for chunk in chunks]
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        whole = 0 if runner.program is None else runner.program.instructions
        # A few tokens take as long as one; of more, each takes its share.
        size = max(1.0, tokens / _TOKENS_FOR_FREE)
        return runner.logits_in_pieces(chunks, max(4, int(_PIECE_SHARE * whole / size)))


_DONE = object()


def _in_float(pieces: Pieces) -> Pieces:
    """Do ``pieces`` with activations that are not rounded, which would hide what is looked for."""
    while True:
        try:
            with nf4_linear_in_float():
                next(pieces)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits
        yield


def trial_cache(
    shapes: Mapping[int, LayerShape], dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Return a cache for a trial's passes; block 0 belongs to nobody."""
    blocks = max(*_TIMED_TOKENS, 3 * _BLOCKS)
    return KVCache(shapes, 1 + blocks, _BLOCK_TOKENS, dtype, device)


def _table(index: int, blocks: int) -> range:
    return range(1 + index * blocks, 1 + (index + 1) * blocks)


def _differences(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float, bool]:
    """Return the divergence, the relative error, and whether both prefer the same token."""
    scale = (expected.amax() - expected.amin()).clamp_min(1e-6)
    relative = float((got - expected).abs().amax() / scale)
    return divergence(expected, got), relative, bool(expected.argmax() == got.argmax())
