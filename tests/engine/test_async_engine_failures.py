"""A stream ends even when the engine, its thread or its reader's event loop does not work."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manylora_server.core.errors import NotReadyError
from manylora_server.core.types import FinishReason, Request, RequestOutput
from manylora_server.engine.async_engine import AsyncEngine
from support.models import save_model
from support.serving import build, inner, request

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("async-failures")
    save_model("llama", root)
    return root


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[AsyncEngine]:
    made = build(folder, tmp_path, kv_block_tokens=4)
    yield made
    made.close()


async def collect(engine: AsyncEngine, wanted: Request) -> list[RequestOutput]:
    async def work() -> list[RequestOutput]:
        return [output async for output in engine.generate(wanted)]

    return await asyncio.wait_for(work(), 60)


def explode(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("planted")


def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        engine.start()
        with monkeypatch.context() as patched:
            patched.setattr(inner(engine), "step", explode)
            last = (await collect(engine, request("x", PROMPT)))[-1]
            assert (last.finish_reason, last.error) == (FinishReason.ERROR, "the engine failed")
        assert engine.ready
        last = (await collect(engine, request("y", PROMPT, max_tokens=2)))[-1]
        assert last.finish_reason is FinishReason.LENGTH

    asyncio.run(work())


def test_a_request_that_cannot_be_added_ends_alone(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        engine.start()
        with monkeypatch.context() as patched:
            patched.setattr(inner(engine), "add", explode)
            (last,) = await collect(engine, request("x", PROMPT))
            assert (last.finish_reason, last.request_id) == (FinishReason.ERROR, "x")
        assert (await collect(engine, request("y", PROMPT, max_tokens=2)))[-1].error is None

    asyncio.run(work())


def test_a_dead_thread_leaves_no_stream_open(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        engine.start()
        for broken in ("step", "fail_all"):
            monkeypatch.setattr(inner(engine), broken, explode)
        (last,) = await collect(engine, request("x", PROMPT))
        assert last.finish_reason is FinishReason.ERROR
        engine._thread.join(60)
        assert engine.dead
        assert not engine.ready
        assert engine.unfinished == 0
        with pytest.raises(NotReadyError):
            await collect(engine, request("y", PROMPT))
        await engine.drain(60)

    asyncio.run(work())


def test_a_reader_s_closed_event_loop_harms_no_other(engine: AsyncEngine) -> None:
    engine.start()
    loop = asyncio.new_event_loop()
    stream = engine.generate(request("gone", PROMPT, max_tokens=100))
    loop.run_until_complete(anext(stream))
    loop.close()

    async def work() -> None:
        last = (await collect(engine, request("here", PROMPT, max_tokens=20)))[-1]
        assert last.finish_reason is FinishReason.LENGTH
        assert engine.ready

    asyncio.run(work())
