"""What the real engine refuses, and that it serves on afterwards."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from support.server_process import Run, served, wait_until, wait_until_idle
from support.serving import build
from support.world import BASE, CONTEXT, NEW_TOKENS, PROMPTS, Background

JSON = {"content-type": "application/json"}
LONG = {"max_tokens": CONTEXT - 100, "ignore_eos": True}


@pytest.fixture(autouse=True)
def serves_on(request, expect):
    """After each refusal, the same server answers rightly."""
    yield
    if "client" in request.fixturenames or "http" in request.fixturenames:
        answer = request.getfixturevalue("client").completions.create(
            model="dora",
            prompt=PROMPTS[0],
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.choices[0].text == expect("dora", PROMPTS[0]).text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
        ({"adapter": "dora@00000000"}, 404, "adapter_not_found", "adapter"),
        ({"adapter": "dora@0123"}, 400, "invalid_request", "adapter"),
        ({"adapter": ""}, 400, "invalid_request", "adapter"),
        ({"adapter": {"dora": 0.5, "rs": 0.5}}, 422, "adapter_unsupported", "adapter"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"model": f"{BASE}:nobody"}, 404, "model_not_found", "model"),
        ({"model": "dora", "adapter": "rs"}, 400, "invalid_request", "adapter"),
        ({"model": "dora", "adapter": None}, 400, "invalid_request", "adapter"),
        ({"prompt": "x" * CONTEXT}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * (CONTEXT + 9)}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": CONTEXT}, 400, "context_length_exceeded", "max_tokens"),
        ({"prompt": ""}, 400, "invalid_request", "prompt"),
        ({"prompt": ["a", ""]}, 400, "invalid_request", "prompt[1]"),
        ({"prompt": [1, 320]}, 400, "invalid_request", "prompt"),
        ({"prompt": None}, 400, "invalid_request", "prompt"),
        ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
        ({"temperature": -1}, 400, "invalid_request", "temperature"),
        ({"n": 0}, 400, "invalid_request", "n"),
        ({"logprobs": 21}, 400, "invalid_request", "logprobs"),
        ({"logit_bias": {"320": 1}}, 400, "invalid_request", "logit_bias"),
        ({"stop_token_ids": [320]}, 400, "invalid_request", "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 8}, 400, "invalid_request", "min_tokens"),
        ({"timeout_s": 0}, 400, "invalid_request", "timeout_s"),
        ({"suffix": "end"}, 400, "invalid_request", "suffix"),
        ({"temprature": 1}, 400, "invalid_request", "temprature"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(http, client, fields, status, code, param, stream):
    response = http.post("/v1/completions", json={"prompt": "Hi", "stream": stream, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"]


@pytest.mark.parametrize("fields", [{"tools": [{}]}, {"messages": []}, {"top_logprobs": 2}])
def test_chat_refusals(client, fields):
    body = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**body)
    assert refused.value.code == "invalid_request"
    assert refused.value.param == next(iter(fields))


def test_a_chat_without_room_for_an_answer(client):
    message = {"role": "user", "content": "x" * CONTEXT}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=[message])
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("content", [b"", b"{", b'{"prompt": "\xff"}', b"[" * 50_000])
def test_malformed_bodies(http, client, content):
    response = http.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"


def test_a_body_that_is_too_large(http, client):
    response = http.post("/v1/completions", json={"prompt": "x" * 17_000_000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "payload_too_large"


def test_one_prompt_too_many_refuses_the_whole_call(client, server: Run):
    before = server.metric("engine_step_seconds_count")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=BASE, prompt=["ok", "x" * CONTEXT, "ok"], n=2)
    assert server.metric("engine_step_seconds_count") == before


def test_more_than_the_kv_cache_holds(start):
    run = start("--kv-cache-memory=64KiB").until_ready()
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
        # 64 KiB are eight blocks, one of them reserved: 112 tokens.
        fits = client.completions.create(
            model="rs", prompt="x" * 12, max_tokens=100, extra_body={"ignore_eos": True}
        )
        assert fits.usage.total_tokens == 112
        with pytest.raises(openai.BadRequestError, match="KV cache of 112 tokens") as refused:
            client.completions.create(model="rs", prompt="x" * 13, max_tokens=100)
    assert refused.value.code == "context_length_exceeded"
    wait_until_idle(run.url)


class TestTimeout:
    @pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"]])
    def test_while_it_runs(self, http, client, server, prompt):
        body = {"prompt": prompt, **LONG, "timeout_s": 0.3}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 504
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("timeout", "timeout_s")
        # Without another request to bring the gauges up to date.
        wait_until_idle(server.url)

    def test_before_the_first_token(self, http, client, server):
        body = {"prompt": "Hi", **LONG, "timeout_s": 1e-9, "stream": True}
        assert http.post("/v1/completions", json=body).status_code == 504
        wait_until_idle(server.url)

    def test_in_a_stream(self, client, server):
        stream = client.completions.create(
            model="rs",
            prompt="Hi",
            max_tokens=LONG["max_tokens"],
            stream=True,
            extra_body={"ignore_eos": True, "timeout_s": 0.5},
        )
        texts: list[str] = []
        with pytest.raises(openai.APIError, match="timeout_s") as ended:
            texts.extend(chunk.choices[0].text for chunk in stream)
        assert ended.value.code == "timeout"
        assert texts
        wait_until_idle(server.url)


def test_a_full_queue(world, expect):
    """Two run, two wait; whoever comes then is told to come back.

    In this process: the command line has no option for the queue's length.
    """
    limits = {"max_sequences": 2, "max_queue": 2, "kv_cache_bytes": 4 * 1024**2}
    engine = build(world.base, world.home, quantization="nf4", adapters=world.adapters, **limits)
    with served(engine) as url, Background(url) as crowd:
        for adapter in (None, "rs", "dora", "rs"):
            crowd.stream(adapter=adapter, prompt="Hi", **LONG)
        wait_until(lambda: engine.unfinished == 4, "four requests")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

            def ask(**fields: Any) -> Any:
                return client.completions.create(
                    model="rs",
                    prompt=PROMPTS[0],
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                    **fields,
                )

            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as refused:
                    ask(stream=stream)
                assert refused.value.status_code == 503
                assert refused.value.code == "overloaded"
                assert int(refused.value.response.headers["retry-after"]) >= 1
            crowd.close()
            wait_until(lambda: engine.unfinished == 0, "an empty queue")
            assert ask().choices[0].text == expect("rs", PROMPTS[0]).text


def test_a_call_that_fits_the_queue_only_in_part(world):
    """All of a call's requests are accepted, or none."""
    engine = build(
        world.base,
        world.home,
        quantization="nf4",
        max_sequences=1,
        max_queue=1,
        kv_cache_bytes=4 * 1024**2,
    )
    with (
        served(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        for stream in (False, True):
            with pytest.raises(openai.APIError) as refused:
                client.completions.create(model=BASE, prompt="Hi", n=5, stream=stream)
            assert refused.value.code == "overloaded"
            assert getattr(refused.value, "status_code", None) == 503
        # The metrics lag behind what was accepted: they may say so before the aborts were seen.
        wait_until(lambda: engine.unfinished == 0, "nothing accepted any more")
        wait_until_idle(url)
        assert client.completions.create(model=BASE, prompt="Hi", n=2).choices
