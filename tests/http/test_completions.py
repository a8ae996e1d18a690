"""``POST /v1/completions``: shapes, several prompts, samples, log-probabilities, echo."""

from __future__ import annotations

import pytest

from support.fake_engine import BASE, REPLY

REPLY_TOKENS = len(REPLY.encode())


def test_answers_as_openai_does(api):
    response = api.complete()
    content = response.json()
    assert response.status_code == 200
    assert content.pop("id").startswith("cmpl-")
    assert isinstance(content.pop("created"), int)
    assert content == {
        "object": "text_completion",
        "model": BASE,
        "adapter": None,
        "choices": [{"text": REPLY, "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": REPLY_TOKENS,
            "total_tokens": 2 + REPLY_TOKENS,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_sixteen_tokens_by_default(api):
    response = api.post("/v1/completions", {"prompt": "Hi", "adapter": "alpha"})
    assert response.json()["usage"]["completion_tokens"] == 16
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_the_default_is_cut_to_what_fits(api):
    assert api.post("/v1/completions", {"prompt": "x" * 508}).status_code == 200
    assert api.engine.requests[-1].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [(39, 72)]),
        ([39, 72], [(39, 72)]),
        (["Hi", "i"], [(39, 72), (72,)]),
        ([[39], [72, 72]], [(39,), (72, 72)]),
    ],
    ids=["text", "ids", "texts", "lists of ids"],
)
def test_forms_of_prompt(api, prompt, expected):
    response = api.complete(prompt=prompt)
    assert response.status_code == 200, response.text
    assert [request.prompt_token_ids for request in api.engine.requests] == expected
    assert len(response.json()["choices"]) == len(expected)


def test_prompts_and_samples_run_together_in_index_order(api):
    api.engine.script.cached_tokens = 1
    response = api.complete(prompt=["a", "bb"], n=3, seed=7)
    content = response.json()
    assert [choice["index"] for choice in content["choices"]] == list(range(6))
    assert api.engine.most_running == 6
    by_id = sorted(api.engine.requests, key=lambda request: request.request_id)
    assert [len(request.prompt_token_ids) for request in by_id] == [1, 1, 1, 2, 2, 2]
    assert [request.sampling.seed for request in by_id] == [7, 8, 9, 7, 8, 9]
    # A prompt counts once, however many samples continue it.
    assert content["usage"]["prompt_tokens"] == 3
    assert content["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert content["usage"]["completion_tokens"] == 6 * REPLY_TOKENS


def test_request_ids_are_unique_even_where_the_client_repeats_its_own(api):
    for _ in range(2):
        api.post("/v1/completions", {"prompt": ["a", "b"]}, headers={"x-request-id": "same"})
    ids = [request.request_id for request in api.engine.requests]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("prompt", ["Hü", [39, 72]])
def test_echo(api, prompt):
    text = prompt if isinstance(prompt, str) else "Hi"
    assert api.complete(prompt=prompt, echo=True).json()["choices"][0]["text"] == text + REPLY


def test_stop_string(api):
    choice = api.complete(stop=[", w"]).json()["choices"][0]
    assert choice["text"] == "Grüße"
    assert choice["finish_reason"] == "stop"


def test_logprobs(api):
    logprobs = api.complete(logprobs=2, max_tokens=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["G", "r", "�"]
    assert logprobs["token_logprobs"] == [-0.25, -0.25, -0.25]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert [next(iter(top)) for top in logprobs["top_logprobs"]] == ["G", "r", "�"]
    assert logprobs["top_logprobs"][0] == {"G": -0.25, "H": -0.5}


def test_logprobs_zero_reports_the_token_taken(api):
    logprobs = api.complete(logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"G": -0.25}]


def test_sampling_reaches_the_engine(api):
    response = api.complete(
        temperature=0,
        top_p=0.5,
        top_k=5,
        min_p=0.25,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 1.5},
        seed=-3,
        stop="zzz",
        stop_token_ids=[257],
        min_tokens=1,
        ignore_eos=True,
        priority=3,
        timeout_s=60,
        user="me",
    )
    assert response.status_code == 200, response.text
    [request] = api.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0,
        0.5,
        5,
        0.25,
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert sampling.repetition_penalty == 1.5
    assert sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert (sampling.seed, sampling.stop, sampling.stop_token_ids) == (-3, ("zzz",), (257,))
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.max_tokens) == (1, True, 100)
    assert request.priority == 3
    assert request.deadline is not None
    assert 59.9 < request.deadline - request.arrival < 60.1


def test_top_k_of_minus_one_is_off(api):
    assert api.complete(top_k=-1).status_code == 200
    assert api.engine.requests[0].sampling.top_k == 0
