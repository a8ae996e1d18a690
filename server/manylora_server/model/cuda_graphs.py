"""Decode steps as CUDA graphs: the model's thousands of launches become one.

A step in which every sequence has one token is padded to a bucket of rows and of blocks a table,
its inputs are copied to fixed addresses, and the bucket's graph is replayed. Adapters differ from
step to step through tables (``graph_adapters``), so one graph serves every batch of them, another
one the steps of the base alone, and others those in which a token has up to two, four, ... adapters
(mixes). Anything else, and what a graph cannot do, runs as it always does:
prefill, adapters that replace modules or change embeddings, batches over the largest bucket.

A bucket is captured when it comes for the second time, and its first replay must give the logits
that the same step gave without a graph; if capture fails or they differ, graphs are given up and
the log says so. Graphs are dropped when memory that they read has moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from manylora_kernels import Segment
from manylora_server.model.adapted import AdaptedModule
from manylora_server.model.attention import KVCache
from manylora_server.model.batch import Chunk
from manylora_server.model.context import ForwardContext, empty_segments, forward_context
from manylora_server.model.graph_adapters import AdapterTables, blocked_slots
from manylora_server.model.graph_inputs import (
    StaticInputs,
    batch_bucket,
    depth_bucket,
    width_bucket,
)

logger = logging.getLogger(__name__)

CAPTURE_AT = 2
MOST_GRAPHS = 64
# Of the largest logit. Kernels repeat their bits, but a BLAS may choose otherwise in a capture.
_TOLERANCE = 2e-2

Bucket = tuple[int, int, int]


class Graph(Protocol):
    """A captured call."""

    @property
    def output(self) -> torch.Tensor:
        """What the call returned; always the same memory."""

    def replay(self) -> object:
        """Compute ``output`` again, from what the inputs hold now."""


Capture = Callable[[Callable[[], torch.Tensor]], Graph]


class CudaCapture:
    """Captures calls on a stream of its own; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], torch.Tensor]) -> Graph:
        """Run ``call`` once, so that nothing is left to be set up, then capture it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()
        self._stream.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        # Other threads copy adapters meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = call()
        current.wait_stream(self._stream)
        return _Captured(graph, output)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: Any
    output: torch.Tensor

    def replay(self) -> object:
        return self.graph.replay()


@dataclass(frozen=True, slots=True)
class _Step:
    inputs: StaticInputs
    tables: AdapterTables | None
    graph: Graph

    def fill(self, chunks: Sequence[Chunk], segments: Sequence[Segment]) -> bool:
        if self.tables is not None and not self.tables.fill(segments):
            return False
        self.inputs.fill(chunks)
        return True


class DecodeGraphs:
    """The graphs of one model. Owned by the engine's thread; ``wrapped`` are its adapted modules.

    ``capture`` makes a graph of a call; on a GPU that is ``CudaCapture``.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        wrapped: Callable[[], Collection[AdaptedModule]],
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._wrapped = wrapped
        self._dtype = dtype
        self._device = device
        self._capture = capture or CudaCapture(device)
        # The least recently used bucket first.
        self._steps: dict[Bucket, _Step] = {}
        self._seen: dict[Bucket, int] = {}
        self.given_up = False

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The captured buckets: rows, blocks a table, adapters a row."""
        return tuple(self._steps)

    def invalidate(self) -> None:
        """Drop every graph: something that they read has moved."""
        self._steps.clear()

    def logits(self, chunks: Sequence[Chunk], segments: Sequence[Segment]) -> torch.Tensor | None:
        """Return float32 logits, a row per chunk, or ``None`` where there is no graph for the step.

        ``segments``: the rows of each slot.
        """
        modules = self._wrapped()
        bucket = self._bucket(chunks, segments, modules)
        if bucket is None:
            return None
        step = self._steps.pop(bucket, None)
        if step is not None and step.tables is not None and not step.tables.hold(modules):
            self._drop_adapted()
            step = None
        if step is not None and not step.fill(chunks, segments):
            # An adapter of a larger rank has come; the next capture makes room for it.
            step = None
        if step is None:
            self._seen[bucket] = self._seen.get(bucket, 0) + 1
            if self._seen[bucket] < CAPTURE_AT:
                return None
            step = self._make(bucket, chunks, segments, modules)
            if step is None:
                return None
        self._steps[bucket] = step
        if len(self._steps) > MOST_GRAPHS:
            del self._steps[next(iter(self._steps))]
        step.graph.replay()
        return step.graph.output[: len(chunks)].to(torch.float32, copy=True)

    def _drop_adapted(self) -> None:
        """Drop the graphs with adapters. Loads come in groups, so wait for two steps again."""
        self._steps = {key: step for key, step in self._steps.items() if not key[2]}
        self._seen = {key: count for key, count in self._seen.items() if not key[2]}

    def _bucket(
        self,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
        modules: Collection[AdaptedModule],
    ) -> Bucket | None:
        if self.given_up or not chunks:
            return None
        if not all(len(chunk.token_ids) == 1 and chunk.sample for chunk in chunks):
            return None
        batch = batch_bucket(len(chunks))
        slots = {segment.slot for segment in segments}
        if batch is None or (slots and slots & blocked_slots(modules)):
            return None
        width = width_bucket(max(len(chunk.block_table) for chunk in chunks))
        return batch, width, depth_bucket(max(len(chunk.adapters) for chunk in chunks))

    def _make(
        self,
        bucket: Bucket,
        chunks: Sequence[Chunk],
        segments: Sequence[Segment],
        modules: Collection[AdaptedModule],
    ) -> _Step | None:
        """Capture the step of ``bucket``, filled with this one; ``None`` if that did not work."""
        batch, width, depth = bucket
        inputs = StaticInputs(self._cache, batch, width, self._device)
        tables = None
        static = empty_segments(batch)
        if depth:
            tables = AdapterTables(modules, batch, depth, self._device, self._dtype)
            static = tables.segments
            if not tables.fill(segments):
                return None
        inputs.fill(chunks)
        context = ForwardContext(inputs.attention, static, static)

        def call() -> torch.Tensor:
            with forward_context(context):
                output: torch.Tensor = self._model(
                    input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False
                ).logits[0]
            return output

        expected = call()[: len(chunks)]
        try:
            step = _Step(inputs, tables, self._capture(call))
            step.graph.replay()
            got = step.graph.output[: len(chunks)]
            error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        except RuntimeError as failure:
            self._give_up(f"the model's step cannot be captured ({failure})")
            return None
        # NaN in this step's own logits says nothing of the graph.
        if not error <= _TOLERANCE and bool(expected.isfinite().all()):
            self._give_up(f"a replay's logits differ by {error:.1e} of their range")
            return None
        return step

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self._steps.clear()
        logger.warning("decode steps run without CUDA graphs, which is slower: %s", reason)
