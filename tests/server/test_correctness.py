"""Everybody at once, over HTTP, against transformers and PEFT one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from support.models import build_tokenizer
from support.server_process import Run, wait_until_idle
from support.world import BASE, NEW_TOKENS, PROMPTS

ADAPTERS = (None, "ada", "dora", "plain", "rs")
[LETTER] = build_tokenizer().encode("C")


@dataclass(frozen=True)
class Got:
    """One answer, whole or put together from a stream."""

    text: str
    logprobs: list[float]
    adapter: Any
    usage: dict[str, int]
    finish_reasons: list[str]


def ask(client: openai.OpenAI, prompt: str, *, stream: bool, **arguments: Any) -> Got:
    extra = {"ignore_eos": True, **arguments.pop("extra_body", {})}
    arguments = {"model": BASE, "max_tokens": NEW_TOKENS, "temperature": 0, **arguments}
    arguments |= {"prompt": prompt, "logprobs": 0, "extra_body": extra}
    if stream:
        options = {"include_usage": True}
        answers = list(client.completions.create(stream=True, stream_options=options, **arguments))
    else:
        answers = [client.completions.create(**arguments)]
    choices = [choice for answer in answers for choice in answer.choices]
    fields = {str(answer.model_extra["adapter"]) for answer in answers}
    assert len(fields) == 1, "the chunks of one stream name different adapters"
    used = answers[-1].usage
    return Got(
        text="".join(choice.text for choice in choices),
        logprobs=[p for c in choices if c.logprobs for p in c.logprobs.token_logprobs],
        adapter=answers[0].model_extra["adapter"],
        usage={"prompt": used.prompt_tokens, "new": used.completion_tokens},
        finish_reasons=[c.finish_reason for c in choices if c.finish_reason],
    )


def all_at_once(calls: list[Callable[[], Got]]) -> list[Got]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("streams", [0, 1])
def test_a_mixed_crowd(client, server: Run, expect, digests, streams):
    # Every prompt by every adapter, every other one streamed; the second time the others are.
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    right = [expect(adapter, prompt) for prompt, adapter in cases]
    mixed = server.metric("batch_distinct_adapters_bucket", le="+Inf")
    mixed -= server.metric("batch_distinct_adapters_bucket", le="2.0")
    calls = [
        lambda prompt=prompt, adapter=adapter, stream=index % 2 == streams: ask(
            client, prompt, stream=stream, extra_body={"adapter": adapter}
        )
        for index, (prompt, adapter) in enumerate(cases)
    ]
    answers = all_at_once(calls)
    for (prompt, adapter), expected, got in zip(cases, right, answers, strict=True):
        assert got.text == expected.text, (adapter, prompt)
        assert got.logprobs == pytest.approx(expected.chosen, abs=1e-3), (adapter, prompt)
        assert got.usage == {"prompt": len(expected.prompt), "new": NEW_TOKENS}
        assert got.finish_reasons == ["length"]
        if adapter is None:
            assert got.adapter is None
        else:
            assert got.adapter == [{"name": adapter, "digest": digests[adapter], "weight": 1.0}]
    more = server.metric("batch_distinct_adapters_bucket", le="+Inf")
    more -= server.metric("batch_distinct_adapters_bucket", le="2.0")
    assert more > mixed, "no batch held more than two adapters"
    # What an adapter changes is to be seen.
    assert len({got.text for got in answers[:5]}) == 5


def test_a_crowd_on_a_server_too_small_for_it(start, expect):
    """Two sequences at once, one adapter slot, hardly any KV blocks.

    Whether a sequence is preempted depends on when requests arrive; tests/parity makes sure of it.
    """
    tight = ("--max-sequences=2", "--adapter-slots=1", "--max-batch-tokens=24")
    run = start("--kv-cache-memory=56KiB", *tight).until_ready()
    cases = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    right = [expect(adapter, prompt) for prompt, adapter in cases]
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
        calls = [
            lambda prompt=prompt, adapter=adapter, stream=index % 2 == 0: ask(
                client, prompt, stream=stream, extra_body={"adapter": adapter}
            )
            for index, (prompt, adapter) in enumerate(cases)
        ]
        answers = all_at_once(calls)
    assert [got.text for got in answers] == [expected.text for expected in right]
    assert run.metric("adapter_evictions_total") > 0
    wait_until_idle(run.url)


def test_the_prefix_cache_tells_adapters_apart(client, expect):
    """A prompt's first two blocks are known to the adapter that has read it, and to no other."""
    prompt = "A prompt that no other test uses, a little over"

    def cached(adapter: str | None) -> int:
        answer = client.completions.create(
            model=BASE,
            prompt=prompt,
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"adapter": adapter, "ignore_eos": True},
        )
        assert answer.choices[0].text == expect(adapter, prompt).text
        return answer.usage.prompt_tokens_details.cached_tokens

    assert len(prompt) in range(33, 48)
    for adapter in ("plain", "rs", None):
        assert [cached(adapter), cached(adapter)] == [0, 32]
    assert cached("plain") == 32


def test_seeds(client, expect):
    """A seeded request draws the same alone, streamed, and among others."""
    drawn = {"temperature": 1.2, "top_p": 0.95, "seed": 7, "max_tokens": 40}
    extra = {"adapter": "plain", "top_k": 100}

    def seeded(*, stream: bool = False, **changes: Any) -> Got:
        return ask(client, PROMPTS[0], stream=stream, extra_body=extra, **{**drawn, **changes})

    def other(index: int) -> Got:
        adapter = ADAPTERS[index % 5]
        return ask(
            client, PROMPTS[index % 5], stream=False, temperature=1, extra_body={"adapter": adapter}
        )

    alone = seeded()
    assert alone.text != seeded(seed=8).text
    crowd: list[Callable[[], Got]] = [lambda i=i: other(i) for i in range(12)]
    crowd[3:3] = [seeded, lambda: seeded(stream=True)]
    answers = all_at_once(crowd)
    for again in answers[3:5]:
        assert again.text == alone.text
        assert again.logprobs == pytest.approx(alone.logprobs, abs=1e-3)


def test_samples_of_one_seed(client):
    arguments = {"model": "rs", "prompt": "Hi", "max_tokens": 12, "n": 3, "seed": 1}
    texts = [c.text for c in client.completions.create(**arguments).choices]
    assert len(set(texts)) == 3, "the samples are copies"
    assert [c.text for c in client.completions.create(**arguments).choices] == texts


@pytest.mark.parametrize(
    "setting",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"logit_bias": {str(LETTER): 100}},
        {"extra_body": {"repetition_penalty": 5}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_change_greedy_text(client, expect, setting):
    """They change the request that asks for them and nothing else of its batch."""
    extra = {"adapter": "plain", **setting.get("extra_body", {})}
    arguments = {**setting, "extra_body": extra, "max_tokens": 40}
    plain: Callable[[], Got] = lambda: ask(  # noqa: E731
        client, PROMPTS[0], stream=False, extra_body={"adapter": "plain"}
    )
    changed, *others = all_at_once(
        [lambda: ask(client, PROMPTS[0], stream=False, **arguments), *[plain] * 5]
    )
    assert {got.text for got in others} == {expect("plain", PROMPTS[0]).text}
    if "logit_bias" in setting:
        assert changed.text == "C" * 40
    else:
        assert not changed.text.startswith(others[0].text)


def test_settings_of_draws(client, expect):
    """Each, at its most narrow, leaves only the most likely token."""
    right = expect("dora", PROMPTS[1]).text
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        got = ask(
            client,
            PROMPTS[1],
            stream=False,
            temperature=2,
            extra_body={"adapter": "dora", **narrow},
        )
        assert got.text == right
    for narrow in ({"top_p": 1e-9, "temperature": 2}, {"temperature": 1e-6}):
        got = ask(client, PROMPTS[1], stream=False, extra_body={"adapter": "dora"}, **narrow)
        assert got.text == right
