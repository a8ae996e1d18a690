"""Many streams over one engine thread: what they get, and that they always end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manylora_server.core.errors import (
    ContextLengthError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
)
from manylora_server.core.types import FinishReason, Request, RequestOutput
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.model.batch import Chunk
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import build, inner, request, run, tokens_of

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("async")
    base = save_model("llama", root / "base")
    save_adapter(base, lora("llama"), root / "one", 1)
    return root


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[AsyncEngine]:
    made = build(
        folder / "base",
        tmp_path,
        adapters={"one": folder / "one"},
        kv_block_tokens=4,
        max_batch_tokens=16,
        max_sequences=4,
        max_queue=6,
    )
    yield made
    made.close()


class Gate:
    """A runner whose steps wait for ``open``; it tells when one is waiting."""

    def __init__(self, engine: AsyncEngine) -> None:
        core = inner(engine)
        self._runner = core._runner
        core._runner = self
        self.open = threading.Event()
        self.waiting = threading.Event()
        self.error: BaseException | None = None

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.waiting.set()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        return self._runner.logits(chunks)


async def collect(engine: AsyncEngine, wanted: Request) -> list[RequestOutput]:
    return [output async for output in engine.generate(wanted)]


async def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


def within(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 60)

    asyncio.run(limited())


def assert_free(engine: AsyncEngine) -> None:
    core = inner(engine)
    core.check_integrity()
    assert core.scheduler.blocks.used == 0
    assert engine.unfinished == 0


def test_concurrent_requests_get_what_they_get_alone(engine: AsyncEngine) -> None:
    one = engine.adapters.resolve("one")
    wanted = [
        request(f"r{i}", [*PROMPT[: 1 + i % 5], 60 + i], one if i % 2 else None, max_tokens=7)
        for i in range(10)
    ]
    expected = {r.request_id: tokens_of(run(inner(engine), {0: [r]})[r.request_id]) for r in wanted}

    async def work() -> None:
        engine.start()
        streams = await asyncio.gather(*(collect(engine, r) for r in wanted))
        for asked, outputs in zip(wanted, streams, strict=True):
            assert tokens_of(outputs) == expected[asked.request_id]
            assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason is FinishReason.LENGTH

    within(work())
    assert_free(engine)


def test_closing_a_stream_early_frees_its_blocks(engine: AsyncEngine) -> None:
    async def work() -> None:
        engine.start()
        stream = engine.generate(request("long", PROMPT, max_tokens=200))
        first = await anext(stream)
        assert first.finish_reason is None
        await stream.aclose()  # type: ignore[attr-defined]
        await wait_for(lambda: engine.unfinished == 0)
        # A later request is behind the abort in the engine's queue.
        await collect(engine, request("next", PROMPT, max_tokens=1))
        assert_free(engine)

    within(work())


def test_a_cancelled_reader_aborts_its_request(engine: AsyncEngine) -> None:
    gate = Gate(engine)

    async def work() -> None:
        engine.start()
        reader = asyncio.create_task(collect(engine, request("x", PROMPT, max_tokens=200)))
        await wait_for(gate.waiting.is_set)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        gate.open.set()
        await wait_for(lambda: engine.unfinished == 0)
        assert_free(engine)

    within(work())


def test_overload_is_refused_and_passes(engine: AsyncEngine) -> None:
    gate = Gate(engine)

    async def work() -> None:
        engine.start()
        # Four may run and six may wait.
        readers = [
            asyncio.create_task(collect(engine, request(str(i), PROMPT, max_tokens=2)))
            for i in range(10)
        ]
        await wait_for(lambda: engine.unfinished == 10)
        with pytest.raises(OverloadedError, match="10 requests are running or waiting"):
            await collect(engine, request("more", PROMPT))
        assert engine.unfinished == 10
        gate.open.set()
        await asyncio.gather(*readers)
        assert len(await collect(engine, request("more", PROMPT, max_tokens=2))) == 2

    within(work())


@pytest.mark.parametrize(
    ("prompt", "new", "error", "param", "message"),
    [
        (0, 5, InvalidRequestError, "prompt", "at least one is needed"),
        (250, 7, ContextLengthError, "max_tokens", "250 prompt tokens and 7 new ones make 257"),
        (256, 1, ContextLengthError, "prompt", "context is 256 tokens"),
        (40, 41, ContextLengthError, "max_tokens", "81 tokens do not fit the KV cache of 80"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(
    engine: AsyncEngine,
    prompt: int,
    new: int,
    error: type[InvalidRequestError],
    param: str,
    message: str,
) -> None:
    if "KV cache" in message:
        engine.limits = replace(engine.limits, max_cached_tokens=80)

    async def work() -> None:
        engine.start()
        with pytest.raises(error, match=message) as raised:
            await collect(engine, request("x", [5] * prompt, max_tokens=new))
        assert raised.value.param == param
        assert engine.unfinished == 0

    within(work())


def test_the_largest_request_that_is_accepted_also_ends(folder: Path, tmp_path: Path) -> None:
    engine = build(
        folder / "base", tmp_path, kv_block_tokens=4, max_batch_tokens=7, kv_cache_bytes=8192
    )
    most = engine.limits.max_cached_tokens
    assert 4 <= most < 256

    async def work() -> None:
        engine.start()
        outputs = await collect(engine, request("x", [5] * (most - 3), max_tokens=3))
        assert len(tokens_of(outputs)) == 3

    within(work())
    engine.close()


def test_drain_lets_requests_finish_and_refuses_new_ones(engine: AsyncEngine) -> None:
    gate = Gate(engine)

    async def work() -> None:
        engine.start()
        assert engine.ready
        reader = asyncio.create_task(collect(engine, request("x", PROMPT, max_tokens=5)))
        # Held in its first step, or it could end before anyone looks.
        await wait_for(gate.waiting.is_set)
        assert engine.unfinished == 1
        draining = asyncio.create_task(engine.drain(60))
        await wait_for(lambda: not engine.ready)
        gate.open.set()
        await draining
        assert not engine.ready
        assert (await reader)[-1].finish_reason is FinishReason.LENGTH
        with pytest.raises(NotReadyError):
            await collect(engine, request("late", PROMPT))

    within(work())


def test_drain_aborts_what_does_not_finish_in_time(engine: AsyncEngine) -> None:
    gate = Gate(engine)

    async def work() -> None:
        engine.start()
        reader = asyncio.create_task(collect(engine, request("x", PROMPT, max_tokens=200)))
        await wait_for(gate.waiting.is_set)
        draining = asyncio.create_task(engine.drain(0))
        await asyncio.sleep(0)
        gate.open.set()
        await draining
        assert (await reader)[-1].finish_reason is FinishReason.ABORT
        assert_free(engine)

    within(work())


def test_before_the_start_and_after_the_end_nothing_is_accepted(engine: AsyncEngine) -> None:
    async def work() -> None:
        with pytest.raises(NotReadyError):
            await collect(engine, request("early", PROMPT))
        assert not engine.dead
        engine.start()
        engine.close()
        assert engine.dead
        with pytest.raises(NotReadyError):
            await collect(engine, request("late", PROMPT))

    within(work())


@pytest.mark.parametrize("kind", ["running", "just sent"])
def test_closing_ends_every_stream_with_an_error(engine: AsyncEngine, kind: str) -> None:
    gate = Gate(engine)

    async def work() -> None:
        engine.start()
        reader = asyncio.create_task(collect(engine, request("x", PROMPT, max_tokens=200)))
        await wait_for(gate.waiting.is_set)
        closing = threading.Thread(target=engine.close)
        late = None
        if kind == "just sent":
            # It is behind the order to stop in the queue.
            engine._inbox.put(None)
            late = asyncio.create_task(collect(engine, request("y", PROMPT)))
            await wait_for(lambda: engine.unfinished == 2)
        closing.start()
        gate.open.set()
        for task in filter(None, (reader, late)):
            last = (await task)[-1]
            assert last.finish_reason is FinishReason.ERROR
            assert last.error == "the server is shutting down"
        closing.join()

    within(work())
