"""Every endpoint, driven by OpenAI's own client wherever it has a call for it."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest

from manylora_server.version import __version__
from support.server_process import Run
from support.world import BASE, CHAT, CHAT_TEXT, CONTEXT, NEW_TOKENS, PROMPTS

GREEDY: dict[str, Any] = {"model": BASE, "max_tokens": NEW_TOKENS, "temperature": 0}
ALL: dict[str, Any] = {**GREEDY, "extra_body": {"ignore_eos": True}}


def test_completion(client, expect):
    answer = client.completions.create(prompt=PROMPTS[0], **ALL)
    right = expect(None, PROMPTS[0])
    assert (answer.object, answer.model) == ("text_completion", BASE)
    assert answer.model_extra["adapter"] is None
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, right.text, "length")
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == len(right.prompt)
    assert answer.usage.completion_tokens == NEW_TOKENS
    assert answer.usage.total_tokens == len(right.prompt) + NEW_TOKENS


def test_completion_stream(client, expect):
    stream = client.completions.create(
        prompt=PROMPTS[1], stream=True, stream_options={"include_usage": True}, **ALL
    )
    *chunks, last = list(stream)
    right = expect(None, PROMPTS[1])
    assert "".join(chunk.choices[0].text for chunk in chunks) == right.text
    assert len(chunks) > 2, "the text came in one piece"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == []
    assert last.usage.prompt_tokens == len(right.prompt)
    assert last.usage.completion_tokens == NEW_TOKENS


@pytest.mark.parametrize("adapter", [None, "dora"])
def test_chat(client, expect, adapter):
    right = expect(adapter, CHAT_TEXT)
    answer = client.chat.completions.create(
        messages=CHAT, logprobs=True, top_logprobs=3, **_on(adapter)
    )
    assert answer.object == "chat.completion"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", right.text)
    assert choice.finish_reason == "length"
    assert [entry.logprob for entry in choice.logprobs.content] == close(right.chosen)
    for entry, row in zip(choice.logprobs.content, right.logprobs, strict=True):
        best = sorted(row.tolist(), reverse=True)[:3]
        assert [top.logprob for top in entry.top_logprobs] == close(best)
    assert answer.usage.prompt_tokens == len(right.prompt)
    assert answer.usage.completion_tokens == NEW_TOKENS


@pytest.mark.parametrize("adapter", [None, "dora"])
def test_chat_stream(client, expect, adapter):
    right = expect(adapter, CHAT_TEXT)
    arguments = _on(adapter) | {"max_completion_tokens": NEW_TOKENS}
    del arguments["max_tokens"]
    chunks = list(client.chat.completions.create(messages=CHAT, stream=True, n=2, **arguments))
    texts, roles, ends = {0: "", 1: ""}, {}, {}
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles.setdefault(choice.index, choice.delta.role)
        ends[choice.index] = choice.finish_reason
    assert texts == {0: right.text, 1: right.text}
    assert roles == {0: "assistant", 1: "assistant"}
    assert ends == {0: "length", 1: "length"}


def test_several_prompts_and_samples(client, expect):
    prompts = list(PROMPTS[:3])
    answer = client.completions.create(prompt=prompts, n=2, **_on("rs"))
    right = [expect("rs", prompt) for prompt in prompts for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [e.text for e in right]
    # A prompt counts once, however many samples continue it.
    assert answer.usage.prompt_tokens == sum(len(e.prompt) for e in right[::2])
    assert answer.usage.completion_tokens == 6 * NEW_TOKENS


def test_several_prompts_in_one_stream(client, expect):
    prompts = list(PROMPTS[:3])
    texts = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(prompt=prompts, stream=True, **_on("rs")):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [expect("rs", prompt).text for prompt in prompts]


def test_prompts_of_token_ids(client, expect):
    right = [expect("ada", prompt) for prompt in PROMPTS[:2]]
    one = client.completions.create(prompt=right[0].prompt, **_on("ada"))
    assert [choice.text for choice in one.choices] == [right[0].text]
    two = client.completions.create(prompt=[e.prompt for e in right], **_on("ada"))
    assert [choice.text for choice in two.choices] == [e.text for e in right]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client, expect, stream):
    arguments = {**_on("plain"), "prompt": PROMPTS[1], "echo": True}
    assert (
        _text(client, stream=stream, **arguments) == PROMPTS[1] + expect("plain", PROMPTS[1]).text
    )
    arguments["prompt"] = expect("plain", PROMPTS[1]).prompt
    assert (
        _text(client, stream=stream, **arguments) == PROMPTS[1] + expect("plain", PROMPTS[1]).text
    )


def test_completion_logprobs(client, expect):
    right = expect("ada", PROMPTS[0])
    [choice] = client.completions.create(prompt=PROMPTS[0], logprobs=2, **_on("ada")).choices
    logprobs = choice.logprobs
    assert logprobs.token_logprobs == close(right.chosen)
    assert len(logprobs.tokens) == len(logprobs.text_offset) == NEW_TOKENS
    for row, top in zip(right.logprobs, logprobs.top_logprobs, strict=True):
        assert max(top.values()) == close(float(row.max()))


def test_streamed_logprobs(client, expect):
    right = expect("ada", PROMPTS[0])
    stream = client.completions.create(prompt=PROMPTS[0], logprobs=0, stream=True, **_on("ada"))
    choices = [choice for chunk in stream for choice in chunk.choices]
    found = [p for choice in choices if choice.logprobs for p in choice.logprobs.token_logprobs]
    assert found == close(right.chosen)
    assert "".join(choice.text for choice in choices) == right.text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, expect, stream):
    text = expect("plain", PROMPTS[4]).text
    # Whatever comes a while into the text, together with a string that never comes.
    stop = text[6:9]
    cut = text[: text.index(stop)]
    arguments = {**_on("plain"), "prompt": PROMPTS[4], "stop": [stop, "never\0"]}
    assert _text(client, stream=stream, **arguments) == cut
    if not stream:
        [choice] = client.completions.create(**arguments).choices
        assert choice.finish_reason == "stop"


def test_ends(client, expect):
    right = expect(None, PROMPTS[0])
    token = right.tokens[4]
    first = right.tokens.index(token)
    extra = {"ignore_eos": True, "stop_token_ids": [token]}
    answer = client.completions.create(prompt=PROMPTS[0], **{**GREEDY, "extra_body": extra})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == first + 1
    # The end of sequence, made certain; min_tokens forbids it, ignore_eos goes on behind it.
    likely = {**GREEDY, "prompt": "Hi", "logit_bias": {"2": 100}}
    answer = client.completions.create(**likely)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    answer = client.completions.create(**likely, extra_body={"min_tokens": 5})
    assert answer.usage.completion_tokens == 6
    answer = client.completions.create(**likely, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_default_lengths(client):
    # OpenAI's own default for completions, and the rest of the context for a chat.
    answer = client.completions.create(model=BASE, prompt="Hi", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    long = "x" * (CONTEXT - len("User: \nAssistant:") - 3)
    answer = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": long}], extra_body={"ignore_eos": True}
    )
    assert (answer.usage.total_tokens, answer.usage.completion_tokens) == (CONTEXT, 3)


def test_models(client, digests):
    models = client.models.list().data
    assert [model.id for model in models] == [BASE, "ada", "dora", "plain", "rs"]
    base, *adapters = models
    assert base.model_extra["parent"] is None
    assert base.model_extra["max_model_len"] == CONTEXT
    assert {model.model_extra["parent"] for model in adapters} == {BASE}
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests.values())
    assert len(set(digests.values())) == 4


def test_one_model(client, digests):
    assert client.models.retrieve(BASE).model_extra["parent"] is None
    for form in ("rs", f"{BASE}:rs", f"rs@{digests['rs'][:8]}", f"{BASE}:rs@{digests['rs']}"):
        model = client.models.retrieve(form)
        assert model.id == form
        assert model.model_extra["digest"] == digests["rs"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nobody")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("form", "adapter"),
    [
        ({"model": "dora"}, "dora"),
        ({"model": f"{BASE}:dora"}, "dora"),
        ({"model": "dora@{dora}"}, "dora"),
        ({"model": BASE}, None),
        ({"model": BASE, "adapter": None}, None),
        ({"model": BASE, "adapter": "dora"}, "dora"),
        ({"model": BASE, "adapter": "dora@{dora:.8}"}, "dora"),
        ({"model": BASE, "adapter": {"dora": 1}}, "dora"),
        ({"model": BASE, "adapter": [{"name": "dora"}]}, "dora"),
        ({"model": "dora", "adapter": "dora"}, "dora"),
        ({"adapter": "dora"}, "dora"),
        ({}, None),
    ],
    ids=str,
)
def test_who_answers(http, expect, digests, form, adapter):
    form = {k: v.format(**digests) if isinstance(v, str) else v for k, v in form.items()}
    body = {"prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json={**body, **form}).raise_for_status().json()
    assert answer["choices"][0]["text"] == expect(adapter, PROMPTS[0]).text
    assert answer["model"] == form.get("model", BASE)
    if adapter is None:
        assert answer["adapter"] is None
    else:
        right = {"name": adapter, "digest": digests[adapter], "weight": 1.0}
        assert answer["adapter"] == [right]


@pytest.mark.parametrize("text", ["Hello", "Grüße 🌍 日本\n\t", ""])
def test_tokenize_and_back(http, text):
    answer = http.post("/tokenize", json={"prompt": text}).raise_for_status().json()
    assert (answer["count"], answer["max_model_len"]) == (len(text.encode()), CONTEXT)
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).raise_for_status().json()
    assert back == {"prompt": text}


def test_tokenize_a_conversation(http, expect):
    answer = http.post("/tokenize", json={"model": "rs", "messages": list(CHAT)}).json()
    assert answer["tokens"] == expect(None, CHAT_TEXT).prompt


def test_operations(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize"} <= set(paths)


def test_metrics_count(client, server: Run):
    requests = {"adapter": "rs", "finish_reason": "length"}
    names = [("requests_total", requests), ("time_to_first_token_seconds_count", {})]
    names += [("request_seconds_count", {}), ("inter_token_seconds_count", {})]
    names += [("tokens_total", {"adapter": "rs", "kind": kind}) for kind in ("prompt", "generated")]
    before = [server.metric(name, **labels) for name, labels in names]
    client.completions.create(prompt="Hello", n=2, **_on("rs"))
    after = [server.metric(name, **labels) for name, labels in names]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown == [2, 2, 2, 2 * (NEW_TOKENS - 1), 2 * len("Hello"), 2 * NEW_TOKENS]
    assert server.metric("engine_step_seconds_count") > 0
    assert server.metric("adapter_residency", tier="host") == 4
    assert server.metric("adapter_loads_total", tier="device", outcome="loaded") >= 1
    assert server.metric("build_info", version=__version__) == 1


def test_request_ids(client, http: httpx.Client):
    raw = client.completions.with_raw_response.create(
        prompt="Hi", extra_headers={"x-request-id": "mine 1"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine 1"
    stream = {"prompt": "Hi", "max_tokens": 2, "stream": True}
    ids = [
        http.post("/v1/completions", json=stream).headers["x-request-id"],
        http.post("/v1/completions", json={}).headers["x-request-id"],
        http.get("/nowhere").headers["x-request-id"],
        http.get("/health", headers={"x-request-id": "é".encode()}).headers["x-request-id"],
    ]
    assert all(re.fullmatch(r"req-[0-9a-f]{32}", given) for given in ids)
    assert len(set(ids)) == 4


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-3)


def _on(adapter: str | None) -> dict[str, Any]:
    return {**GREEDY, "extra_body": {"ignore_eos": True, "adapter": adapter}}


def _text(client: openai.OpenAI, *, stream: bool, **arguments: Any) -> str:
    if not stream:
        return client.completions.create(**arguments).choices[0].text
    chunks = client.completions.create(stream=True, **arguments)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)
