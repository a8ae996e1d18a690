"""The official ``openai`` client against a server on a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

from manylora_server.api.app import create_app
from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.core.config import HttpConfig
from support.fake_engine import BASE, REPLY, FakeEngine

KEY = "sk-test"


@contextmanager
def served(engine: FakeEngine, **http: object) -> Iterator[str]:
    app = create_app(engine, HttpConfig(**http), PrometheusMetrics(), engine.adapter_service)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with served(engine, api_keys=(KEY,), max_body_bytes=100_000) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_completions(client):
    answer = client.completions.create(model=BASE, prompt="Hi", max_tokens=100, logprobs=1, n=2)
    assert [choice.text for choice in answer.choices] == [REPLY, REPLY]
    assert answer.choices[0].logprobs.tokens[0] == "G"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completions_stream(client):
    stream = client.completions.create(
        model="alpha",
        prompt="Hi",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == f"alpha: {REPLY}"
    assert chunks[-1].usage.completion_tokens == len(f"alpha: {REPLY}".encode())


def test_chat(client):
    answer = client.chat.completions.create(
        model="alpha",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=1,
    )
    [choice] = answer.choices
    assert choice.message.content == f"alpha: {REPLY}"
    assert choice.message.role == "assistant"
    assert choice.logprobs.content[0].top_logprobs[0].bytes == [97]
    # The answer can be sent back as it came.
    again = [{"role": "user", "content": "Hi"}, choice.message.model_dump()]
    assert client.chat.completions.create(model=BASE, messages=again).choices


def test_chat_stream(client):
    with client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "Hi"}], stream=True, n=2
    ) as stream:
        texts = {0: "", 1: ""}
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == {0: REPLY, 1: REPLY}


def test_the_adapter_field(client):
    answer = client.completions.create(
        model=BASE, prompt="Hi", max_tokens=100, extra_body={"adapter": "beta"}
    )
    assert answer.choices[0].text == f"beta: {REPLY}"
    assert answer.model_extra["adapter"][0]["name"] == "beta"


def test_models(client):
    assert [model.id for model in client.models.list()] == [BASE, "alpha", "beta"]
    assert client.models.retrieve("alpha").owned_by == "manylora"
    assert client.models.retrieve(BASE).id == BASE


def test_errors_are_the_clients_own(client, url):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="Hi")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=BASE, prompt="Hi", temperature=3)
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_an_error_in_a_stream_reaches_the_client():
    engine = FakeEngine()
    engine.script.fail_after = 4
    with (
        served(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = client.completions.create(model=BASE, prompt="Hi", max_tokens=100, stream=True)
        with pytest.raises(openai.APIError, match="on fire"):
            list(stream)


def test_the_request_id_is_kept(client):
    raw = client.models.with_raw_response.list(extra_headers={"x-request-id": "mine"})
    assert raw.headers["x-request-id"] == "mine"


def test_a_body_that_is_too_large_gets_its_answer(url):
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    body = b'{"prompt": "' + b"x" * 3_000_000 + b'"}'
    response = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 413
    response = httpx.post(f"{url}/v1/completions", content=iter([body]), headers=headers)
    assert response.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_aborts(stream):
    engine = FakeEngine()
    engine.script.token_s = 0.05
    with served(engine) as url:
        body = {"prompt": "Hi", "max_tokens": 100, "n": 2, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
        deadline = time.monotonic() + 5
        while engine.running and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not engine.running
        assert len(engine.aborted) == 2
