"""The server's own engine over a model folder, without HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora_server.adapters.twins.job import MergeOrder
from manylora_server.adapters.twins.record import TwinRecord
from manylora_server.core.config import EngineConfig, ModelConfig, ServerConfig
from manylora_server.core.observer import NullObserver
from manylora_server.core.types import (
    AdapterChoice,
    AdapterMix,
    Request,
    RequestOutput,
    SamplingParams,
)
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.engine.build import build_engine
from manylora_server.engine.engine import Engine
from manylora_server.model.batch import Chunk
from manylora_server.model.fingerprint import base_fingerprint
from manylora_store.checkpoint.folder import open_folder
from manylora_store.records import AdapterRecord
from manylora_store.store import AdapterStore

# `make gpu-test` runs the engine's tests on a GPU.
DEVICE = os.environ.get("MANYLORA_TEST_DEVICE", "cpu")


class Recorder:
    """Takes the place of an engine's runners and keeps what each request's tokens came from."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._runner = engine._runner
        self._choose = engine.twins.runner_for
        engine._runner = self
        engine.twins.runner_for = self._twin_for  # type: ignore[method-assign,assignment]
        self.steps: list[list[Chunk]] = []
        self.merged_steps = 0
        self.rows: dict[str, list[torch.Tensor]] = {}

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return self.record(self._runner, chunks)

    def record(self, runner: Any, chunks: Sequence[Chunk]) -> torch.Tensor:
        result: torch.Tensor = runner.logits(chunks)
        self.steps.append(list(chunks))
        running = self._engine.scheduler.running
        owner = {id(s.block_table): s.request.request_id for s in running}
        sampled = [owner[id(chunk.block_table)] for chunk in chunks if chunk.sample]
        for request_id, row in zip(sampled, result.to("cpu", copy=True), strict=True):
            self.rows.setdefault(request_id, []).append(row)
        return result

    def _twin_for(self, digests: set[str | None], tokens: int) -> Any:
        twin = self._choose(digests, tokens)
        if twin is None:
            return None
        self.merged_steps += 1
        return _Recorded(self, twin)


@dataclass
class _Recorded:
    recorder: Recorder
    runner: Any

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return self.recorder.record(self.runner, chunks)


def build(
    folder: Path,
    home: Path,
    *,
    quantization: str = "none",
    device: str = DEVICE,
    dtype: str = "float32",
    adapters: Mapping[str, Path] | None = None,
    **limits: Any,
) -> AsyncEngine:
    """Return an engine that is not started, so that tests may step it themselves."""
    config = ServerConfig(
        model=ModelConfig(
            str(folder),
            "base",
            quantization=quantization,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
        ),
        engine=EngineConfig(**limits),
        home=home,
        adapters=tuple((name, str(path)) for name, path in (adapters or {}).items()),
    )
    engine = build_engine(config, NullObserver())
    engine.prepare()
    return engine


def publish_unchecked(
    home: Path, base: Path, name: str, folder: Path, *, unmixable: str | None = None
) -> None:
    """Register an adapter for a base as if a server had checked and measured it."""
    store = AdapterStore(home)
    files = open_folder(folder, name, "test")
    record = AdapterRecord(
        name=name,
        digest=files.digest,
        peft_type="LORA",
        rank=1,
        ranks={},
        target_modules=(),
        parameters=1,
        bytes=files.weights.size,
        base_model=None,
        created_at=time.time(),
        source="test",
        unmixable=unmixable,
        base_fingerprint=base_fingerprint(base),
        receipt={},
    )
    store.publish(name, files, record)
    store.close()


def inner(engine: AsyncEngine) -> Engine:
    """Return the synchronous engine inside."""
    return engine._engine


def request(
    request_id: str,
    prompt: Sequence[int],
    adapter: AdapterChoice | AdapterMix | None = None,
    **sampling: Any,
) -> Request:
    """Return a greedy request, unless ``sampling`` says otherwise."""
    settings = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
    if isinstance(adapter, AdapterChoice):
        adapter = AdapterMix.of(adapter)
    return Request(request_id, tuple(prompt), SamplingParams(**settings), adapter)


def bring_in(engine: AsyncEngine) -> None:
    """Bring every adapter to the device, so that what a step holds does not depend on loads."""
    residency = inner(engine).residency
    loads = [residency.load(digest) for _, digest, _ in engine.adapters.served()]
    while not all(load.done() for load in loads):
        residency.begin_step()
        residency.host.wait(60)
    for load in loads:
        load.result()


def merge(engine: AsyncEngine, name: str, precision: Any = "bf16", **more: Any) -> TwinRecord:
    """Step an engine that has nothing else to do until the adapter is merged."""
    core = inner(engine)
    order = MergeOrder(engine.adapters.resolve(name).digest, precision, **more)
    future = core.twins.merge(order)
    while not future.done():
        core.step()
        core.check_integrity()
        if core.stalled:
            core.residency.host.wait(60)
    return future.result()


def run(
    engine: Engine,
    arrivals: Mapping[int, Sequence[Request]],
    each_step: Callable[[int], None] = lambda step: None,
) -> dict[str, list[RequestOutput]]:
    """Step until all requests have ended; ``arrivals`` says before which step each comes."""
    outputs: dict[str, list[RequestOutput]] = {}
    step = 0
    last = max(arrivals)
    while engine.has_work or step <= last:
        for arriving in arrivals.get(step, ()):
            engine.add(arriving)
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
        if engine.stalled:
            engine.residency.host.wait(60)
        each_step(step)
        step += 1
        assert step < 5000, "the engine does not finish"
    return outputs


def tokens_of(outputs: Sequence[RequestOutput]) -> list[int]:
    """Return all token ids of one request."""
    return [token for output in outputs for token in output.token_ids]
