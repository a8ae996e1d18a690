"""``POST /v1/chat/completions``: shapes, messages, limits, log-probabilities."""

from __future__ import annotations

import pytest

from support.fake_engine import BASE, REPLY

REPLY_TOKENS = len(REPLY.encode())


def prompt_text(api) -> str:
    return api.engine.tokenizer.decode(api.engine.requests[-1].prompt_token_ids)


def test_answers_as_openai_does(api):
    content = api.chat(adapter="alpha").json()
    assert content.pop("id").startswith("chatcmpl-")
    assert isinstance(content.pop("created"), int)
    usage = content.pop("usage")
    reply = f"alpha: {REPLY}"
    assert content == {
        "object": "chat.completion",
        "model": BASE,
        "adapter": [
            {"name": "alpha", "digest": api.engine.adapters.get("alpha").digest, "weight": 1.0}
        ],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    assert usage["completion_tokens"] == len(reply.encode())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_without_a_limit_the_whole_context_may_be_used(api):
    assert api.chat().status_code == 200
    [request] = api.engine.requests
    assert request.sampling.max_tokens + len(request.prompt_token_ids) == api.engine.max_model_len


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_either_name_of_the_limit(api, field):
    choice = api.chat(**{field: 2}).json()["choices"][0]
    assert choice["message"]["content"] == "Gr"
    assert choice["finish_reason"] == "length"


def test_messages_become_one_prompt(api):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        # What OpenAI's client sends back of an earlier answer.
        {
            "role": "assistant",
            "content": "ok",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"role": "user", "content": "c", "name": "Ada"},
    ]
    assert api.chat(messages=messages).status_code == 200
    assert prompt_text(api) == "System: Be brief.\nUser: ab\nAssistant: ok\nUser: c\nAssistant:"


def test_samples(api):
    choices = api.chat(n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert api.engine.most_running == 3


def test_logprobs(api):
    body = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    logprobs = api.chat(**body).json()["choices"][0]["logprobs"]
    first, _, third = logprobs["content"]
    assert logprobs["refusal"] is None
    assert first == {
        "token": "G",
        "logprob": -0.25,
        "bytes": [71],
        "top_logprobs": [
            {"token": "G", "logprob": -0.25, "bytes": [71]},
            {"token": "H", "logprob": -0.5, "bytes": [72]},
        ],
    }
    # Half a character: its text is U+FFFD, its byte is known all the same.
    assert third["bytes"] == [0xC3]


def test_logprobs_without_alternatives(api):
    logprobs = api.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["content"][0]["top_logprobs"] == []
