"""Streams: framing, order of chunks, usage, and errors before and after the first byte."""

from __future__ import annotations

import pytest

from manylora_server.core.types import FinishReason
from support.fake_engine import BASE, REPLY, FakeEngine


def test_completion_chunks(api, events):
    chunks = events(api.complete(stream=True))
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["model"] == BASE and chunk["adapter"] is None for chunk in chunks)
    # A character of two bytes comes whole, and no chunk is empty.
    assert all(chunk["choices"][0]["text"] for chunk in chunks)


def test_chat_chunks(api, events):
    chunks = events(api.chat(stream=True, model="beta"))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(choice["delta"]["content"] for choice in middle) == f"beta: {REPLY}"
    assert all("role" not in choice["delta"] for choice in middle)
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(chunk["adapter"][0]["name"] == "beta" for chunk in chunks)


@pytest.mark.parametrize("call", ["complete", "chat"])
def test_usage_chunk(api, events, call):
    options = {"include_usage": True}
    chunks = events(getattr(api, call)(stream=True, stream_options=options, n=2))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    whole = getattr(api, call)(n=2).json()
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("call", ["complete", "chat"])
def test_samples_are_interleaved_and_each_ends_once(api, events, call):
    choices = [chunk["choices"][0] for chunk in events(getattr(api, call)(stream=True, n=3))]
    ended = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]
    order = [choice["index"] for choice in choices]
    assert order != sorted(order)


def test_echo_comes_first(api, events):
    chunks = events(api.complete(prompt=["a", "b"], stream=True, echo=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "a" + REPLY, 1: "b" + REPLY}


def test_completion_logprobs_have_running_offsets(api, events):
    chunks = events(api.complete(stream=True, logprobs=1, max_tokens=2))
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [1]]


def test_chat_logprobs_come_even_where_text_is_held_back(api, events):
    chunks = events(api.chat(stream=True, logprobs=True))
    tokens = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(tokens) == len(REPLY.encode())


@pytest.mark.parametrize("call", ["complete", "chat"])
def test_refused_before_the_first_byte(api, error, call):
    response = getattr(api, call)(stream=True, max_tokens=10_000)
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"


def test_failed_before_the_first_token_is_an_http_status(make_api, error):
    engine = FakeEngine()
    engine.script.fail_after = 1
    response = make_api(engine).complete(stream=True)
    assert response.status_code == 500
    assert error(response)["message"] == "the device is on fire"


def test_one_of_several_refused_refuses_the_whole_stream(make_api, error):
    api = make_api(FakeEngine(max_unfinished=2))
    response = api.complete(stream=True, n=3)
    assert response.status_code == 503
    assert error(response)["code"] == "overloaded"
    assert not api.engine.running
    assert len(api.engine.aborted) == 2


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (FinishReason.ERROR, "internal"),
        (FinishReason.TIMEOUT, "timeout"),
        (FinishReason.ABORT, "not_ready"),
    ],
)
def test_failed_midway_is_an_event_and_done(make_api, events, ending, code):
    engine = FakeEngine()
    engine.script.fail_after = 5
    engine.script.ending = ending
    api = make_api(engine)
    response = api.complete(stream=True)
    assert response.status_code == 200
    *chunks, last = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Grü"
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert not engine.running


def test_crash_midway_leaks_nothing(api, events, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("manylora_server.api.completions.CompletionShape.delta", broken)
    response = api.complete(stream=True)
    [last] = events(response)
    assert last["error"]["code"] == "internal"
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert not api.engine.running
