"""Stopping a server under load: nobody accepted is lost, nobody new is let in."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from support.server_process import Run, held, wait_until
from support.world import BASE, CONTEXT, NEW_TOKENS, PROMPTS, Background

DRAINING = "another signal stops at once"


@pytest.fixture
def client(running: Run) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
def running(start) -> Run:
    return start().until_ready()


def text_of(connection: http.client.HTTPConnection) -> str:
    response = connection.getresponse()
    body = response.read().decode()
    assert response.status == 200, body
    if response.headers.get_content_type() == "application/json":
        return json.loads(body)["choices"][0]["text"]
    *frames, done, empty = body.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert not any("error" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_running_requests_finish_and_others_are_refused(running, client, expect, number):
    fields: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "prompt": PROMPTS[0]}
    with Background(running.url) as crowd, Background(running.url) as idle:
        # A connection that is kept alive, one that never asked, and requests of both kinds.
        assert client.models.list().data
        asked = [
            (adapter, crowd.send(adapter=adapter, stream=stream, max_tokens=400, **fields))
            for adapter in (None, "dora", "rs")
            for stream in (False, True)
        ]
        early = crowd.stream(adapter="ada", max_tokens=400, **fields).getresponse()
        assert early.readline().startswith(b"data: ")
        wait_until(lambda: held(running.url)["running_sequences"] == 7, "seven sequences")
        silent = idle.connect()
        running.send(number)
        running.until_logged(DRAINING)
        with pytest.raises(openai.APIError) as refused:
            client.completions.create(model=BASE, prompt="Hi")
        status = getattr(refused.value, "status_code", None)
        assert status == 503 or isinstance(refused.value, openai.APIConnectionError)
        for adapter, connection in asked:
            right = expect(adapter, PROMPTS[0]).text.rstrip("\ufffd")
            assert text_of(connection).startswith(right)
        assert early.read().endswith(b"data: [DONE]\n\n")
        # A connection that asks for nothing holds nobody up.
        assert running.finish() == 0
        silent.close()
    assert "Traceback" not in running.stderr
    assert running.stdout == ""


def test_a_second_signal_stops_at_once(running):
    with Background(running.url) as crowd:
        asked = crowd.stream(prompt="Hi", max_tokens=CONTEXT - 100, ignore_eos=True)
        assert asked.getresponse().readline().startswith(b"data: ")
        running.send(signal.SIGTERM)
        running.until_logged(DRAINING)
        assert running.exit_code is None
        running.send(signal.SIGTERM)
        # Long before the request would have ended, or the time to drain is over.
        assert running.finish(seconds=15) == 1
    assert "stopped at once" in running.stderr
    assert "Traceback" not in running.stderr


def test_an_idle_server_stops(running, client, expect):
    """One that has served; an open connection without a request does not hold it up."""
    answer = client.completions.create(
        model="rs",
        prompt=PROMPTS[0],
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].text == expect("rs", PROMPTS[0]).text
    running.send(signal.SIGINT)
    assert running.finish() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")
    assert "Traceback" not in running.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_while_loading(start, number):
    run = start()
    run.until_logged("loaded ")
    run.send(number)
    # Where it had become ready in the meantime it stops as any server does.
    assert (run.finish() == 0) == ("manylora: serving" in run.stderr)
    assert "Traceback" not in run.stderr
