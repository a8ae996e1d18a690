"""What is refused and what is let pass: every refusal names its field."""

from __future__ import annotations

import pytest

COMPLETION_FAULTS = [
    ({"prompt": None}, "prompt", "is required"),
    ({"prompt": 3}, "prompt", "should be a text"),
    ({"prompt": []}, "prompt", "should be a text"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": ["a", ""]}, "prompt[1]", "no tokens"),
    ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
    ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
    ({"prompt": [1, 1.0]}, "prompt[1]", "valid integer"),
    ({"prompt": [True]}, "prompt[0]", "valid integer"),
    ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
    ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
    ({"prompt": [5, 258]}, "prompt", "prompt[1]: 258 is not a token id; the model's are 0 to 257"),
    ({"prompt": [[1], [2, 999]]}, "prompt[1]", "prompt[1][1]: 999"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer; got '5'"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "greater than or equal to -2"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": [1]}, "stop[0]", "valid string"),
    ({"stop": 1}, "stop", "a string or a list"),
    ({"stop_token_ids": [258]}, "stop_token_ids", "258 is not a token id"),
    ({"logit_bias": {"258": 1}}, "logit_bias", "258 is not a token id"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "match pattern"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "6 is more than the 5 tokens"),
    ({"timeout_s": 0}, "timeout_s", "greater than 0"),
    ({"priority": "high"}, "priority", "valid integer"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "for streams only"),
    (
        {"stream": True, "stream_options": {"include_usag": True}},
        "stream_options.include_usag",
        "did you mean 'include_usage'?",
    ),
    ({"stream": True, "stream_options": 1}, "stream_options", "a JSON object, not a number"),
    ({"temprature": 1}, "temprature", "unknown field; did you mean 'temperature'?"),
    ({"xyzzy": 1}, "xyzzy", "unknown field; this call does not have it"),
    ({"xyzzy": None}, "xyzzy", "unknown field"),
    ({"best_of": 2}, "best_of", "only the value of n"),
    ({"suffix": "end"}, "suffix", "is not supported by this server; leave it out or send ''"),
    ({"echo": True, "logprobs": 1}, "echo", "cannot be combined with logprobs"),
    ({"model": 3}, "model", "valid string"),
]


@pytest.mark.parametrize(("body", "param", "message"), COMPLETION_FAULTS, ids=str)
def test_completion_faults(api, error, body, param, message):
    response = api.complete(**body)
    assert response.status_code == 400, response.text
    found = error(response)
    assert found["code"] == "invalid_request"
    assert found["type"] == "invalid_request_error"
    assert found["param"] == param
    assert message in found["message"]
    assert not api.engine.requests


USER = {"role": "user", "content": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
CHAT_FAULTS = [
    ({"messages": None}, "messages", "is required"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "Hi"}, "messages", "valid list"),
    ({"messages": ["Hi"]}, "messages[0]", "should be a JSON object, not a string"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    ({"messages": [{**USER, "content": 1}]}, "messages[0].content", '{"type": "text"} parts'),
    ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", "'assistant'"),
    ({"messages": [USER, {**USER, "content": [IMAGE]}]}, "messages[1].content[0].type", "'text'"),
    (
        {"messages": [{**USER, "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "is required",
    ),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"messages": [{**USER, "contents": "x"}]}, "messages[0].contents", "mean 'content'"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "contradicts"),
    ({"echo": True}, "echo", "unknown field"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "send 'none' or 'auto'"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"audio": {"voice": "x", "format": "wav"}}, "audio", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"store": True}, "store", "not supported"),
    ({"verbosity": "low"}, "verbosity", "not supported"),
    ({"moderation": {"model": "m"}}, "moderation", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), CHAT_FAULTS, ids=str)
def test_chat_faults(api, error, body, param, message):
    response = api.chat(**body)
    assert response.status_code == 400, response.text
    found = error(response)
    assert found["param"] == param
    assert message in found["message"]
    assert not api.engine.requests


HARMLESS = [
    {"tools": []},
    {"tools": None},
    {"tool_choice": "none"},
    {"tool_choice": "auto"},
    {"functions": []},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
    {"reasoning_effort": None},
    {"reasoning_effort": "none"},
    {"service_tier": "auto"},
    {"store": False},
    {"verbosity": "medium"},
    {"metadata": {"a": "b"}},
    {"parallel_tool_calls": True},
    {"prompt_cache_key": "k"},
    {"safety_identifier": "s"},
    {"user": "u"},
    {"stop": None, "seed": None, "temperature": None, "n": None, "logit_bias": None},
    {"logprobs": False, "top_logprobs": 0},
    {"max_tokens": 5, "max_completion_tokens": 5},
]


@pytest.mark.parametrize("body", HARMLESS, ids=str)
def test_what_asks_for_nothing_is_let_pass(api, body):
    response = api.chat(**body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("body", [{"suffix": None}, {"suffix": ""}, {"best_of": 1}, {"stop": []}])
def test_completion_fields_that_ask_for_nothing(api, body):
    assert api.complete(**body).status_code == 200


def test_the_number_of_faults_is_told(api, error):
    found = error(api.complete(temperature=9, n=0, top_p=0))
    assert "(2 more fields are at fault.)" in found["message"]


def test_a_long_value_is_cut_short_in_the_message(api, error):
    assert len(error(api.complete(max_tokens="x" * 10_000))["message"]) < 300


def test_nothing_is_scheduled_when_one_prompt_is_at_fault(api):
    assert api.complete(prompt=["a", "b" * 500]).status_code == 400
    assert not api.engine.requests
