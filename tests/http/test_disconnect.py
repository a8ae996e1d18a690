"""A client that goes takes its requests with it, at once, whatever stage they are at."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest


async def call_and_leave(api, body: dict[str, Any], *, leave_when) -> list[dict[str, Any]]:
    """Post ``body``, disconnect as soon as ``leave_when(sent)`` holds; return what was sent."""
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    task = asyncio.create_task(api.app(scope, receive, send))
    async with asyncio.timeout(5):
        while not leave_when(sent):
            await asyncio.sleep(0.005)
        gone.set()
        await task
    return sent


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": ["a", "b"], "max_tokens": 100, "n": 2, **more}


def test_while_the_whole_answer_is_awaited(api):
    api.engine.script.token_s = 0.05
    sent = asyncio.run(
        call_and_leave(api, body(), leave_when=lambda _: len(api.engine.running) == 4)
    )
    assert len(api.engine.aborted) == 4
    assert not api.engine.running
    # Nobody reads it; 499 is for the log.
    assert sent[0]["status"] == 499


def test_while_the_first_token_is_awaited(api):
    api.engine.script.token_s = 60
    leave_when = lambda _: len(api.engine.running) == 4  # noqa: E731
    asyncio.run(call_and_leave(api, body(stream=True), leave_when=leave_when))
    assert len(api.engine.aborted) == 4
    assert not api.engine.running


def test_while_the_stream_runs(api):
    api.engine.script.token_s = 0.05
    sent = asyncio.run(
        call_and_leave(api, body(stream=True), leave_when=lambda sent: len(sent) > 2)
    )
    assert sent[0]["status"] == 200
    assert len(api.engine.aborted) == 4
    assert not api.engine.running


def test_where_sending_fails(api):
    """A server may report the client's absence by an error from ``send`` (ASGI 2.4)."""
    api.engine.script.token_s = 0.01

    async def scenario() -> None:
        generation_started = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body(stream=True)).encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            generation_started.set()
            raise OSError("gone")

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        async with asyncio.timeout(5):
            await api.app(scope, receive, send)
        assert generation_started.is_set()

    asyncio.run(scenario())
    assert len(api.engine.aborted) == 4
    assert not api.engine.running


@pytest.mark.parametrize("stream", [False, True])
def test_who_stays_gets_everything(api, stream):
    api.engine.script.token_s = 0.001
    assert api.complete(stream=stream, n=4).status_code == 200
    assert not api.engine.aborted
