"""A client that goes takes its requests with it, and nothing of anybody else's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from support.server_process import Run, held, wait_until, wait_until_idle
from support.world import BASE, CONTEXT, NEW_TOKENS, PROMPTS, Background

LONG = {"max_tokens": CONTEXT - 100, "ignore_eos": True}


def aborted(server: Run, adapter: str) -> float:
    return server.metric("requests_total", adapter=adapter, finish_reason="abort")


@pytest.mark.parametrize("stream", [False, True])
def test_midway(client, server: Run, stream):
    before = aborted(server, "rs")
    with Background(server.url) as leaving:
        leaving.send(prompt=["Hi", "Ho"], n=2, adapter="rs", stream=stream, **LONG)
        wait_until(lambda: held(server.url)["running_sequences"] == 4, "four sequences")
        assert held(server.url)["kv_blocks"] >= 4
    wait_until_idle(server.url)
    assert aborted(server, "rs") - before == 4


def test_openai_s_client_closes_a_stream(client, server: Run):
    before = aborted(server, "_base")
    with client.completions.create(
        model=BASE, prompt="Hi", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for _, chunk in zip(range(5), stream, strict=False):
            assert chunk.choices
        assert held(server.url)["running_sequences"] == 1
    wait_until_idle(server.url)
    assert aborted(server, "_base") - before == 1


def test_others_notice_nothing(client, server: Run, expect):
    """Requests that share batches, an adapter and a prefix with those that leave."""

    def ask(adapter: str | None, *, stream: bool, tokens: int) -> str:
        arguments: dict[str, Any] = {
            "model": BASE,
            "prompt": PROMPTS[2],
            "max_tokens": tokens,
            "temperature": 0,
            "extra_body": {"adapter": adapter, "ignore_eos": True},
        }
        if not stream:
            return client.completions.create(**arguments).choices[0].text
        chunks = client.completions.create(stream=True, **arguments)
        return "".join(chunk.choices[0].text for chunk in chunks)

    adapters = (None, "dora", "rs", "dora")
    calm = [ask(adapter, stream=False, tokens=150) for adapter in adapters]
    for adapter, text in zip(adapters, calm, strict=True):
        assert text.startswith(expect(adapter, PROMPTS[2]).text.rstrip("\ufffd"))
    with ThreadPoolExecutor(len(adapters)) as pool:
        staying = [
            pool.submit(ask, adapter, stream=index % 2 == 0, tokens=150)
            for index, adapter in enumerate(adapters)
        ]
        for round_ in range(4):
            with Background(server.url) as leaving:
                for adapter in ("dora", "plain", None):
                    leaving.send(prompt=PROMPTS[2], adapter=adapter, stream=round_ % 2 == 0, **LONG)
                wait_until(lambda: held(server.url)["running_sequences"] >= 3, "the leaving ones")
        assert [future.result(60) for future in staying] == calm


def test_while_waiting(start, expect):
    """Who goes before its turn has come is not in the way of those behind it."""
    run = start("--max-sequences=1").until_ready()
    with Background(run.url) as leaving, Background(run.url) as going_too:
        leaving.stream(prompt="Hi", adapter="rs", **LONG)
        wait_until(lambda: held(run.url)["running_sequences"] == 1, "the first")
        for stream in (False, True):
            going_too.send(prompt="Hi", adapter="dora", stream=stream, **LONG)
        wait_until(lambda: held(run.url)["queue_depth"] == 2, "two that wait")
        going_too.close()
        wait_until(lambda: held(run.url)["queue_depth"] == 0, "an empty queue")
        assert held(run.url)["running_sequences"] == 1
        leaving.close()
    wait_until_idle(run.url)
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.completions.create(
            model="dora",
            prompt=PROMPTS[0],
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert answer.choices[0].text == expect("dora", PROMPTS[0]).text


def test_many_at_once(client, server: Run):
    """Far more than may run at once come and go; every one is accounted for."""
    for _ in range(2):
        with Background(server.url) as leaving:
            for index in range(40):
                leaving.send(
                    prompt=PROMPTS[index % 5],
                    adapter=(None, "ada", "rs")[index % 3],
                    stream=index % 2 == 0,
                    n=3,
                    **LONG,
                )
            wait_until(lambda: held(server.url)["queue_depth"] > 10, "a queue")
        wait_until_idle(server.url)
