"""Weighted mixes over HTTP: what they answer, whom they keep, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.mixing import Weights, summed
from support.models import build_tokenizer
from support.oracle import greedy
from support.server_process import Run
from support.world import BASE, NEW_TOKENS, PROMPTS, Background, World

MIXES: tuple[Weights, ...] = (
    {"plain": 0.7, "rs": 0.3},
    {"rs": -0.5, "ada": 1.25, "plain": 0.5},
    {"ada": 0.5},
)


@pytest.fixture(scope="module")
def expected(world: World) -> dict[tuple[int, str], str]:
    """Text by the mix's number and the prompt."""
    tokenizer = build_tokenizer()
    found = {}
    for number, weights in enumerate(MIXES):
        model = summed(world.base, "nf4", world.adapters, weights)
        for prompt in PROMPTS:
            tokens, _ = greedy(model, tokenizer.encode(prompt), NEW_TOKENS)
            found[number, prompt] = tokenizer.decode(tokens, skip_special_tokens=True)
    return found


def ask(http: httpx.Client, adapter: Any, prompt: str, **body: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **body}
    return http.post(
        "/v1/completions", json={"model": BASE, "adapter": adapter, "ignore_eos": True, **body}
    )


def test_mixes_beside_everybody_else(http, server: Run, expect, expected, digests):
    before = server.metric("requests_total", adapter="_mix", finish_reason="length")
    calls: list[tuple[Any, str, str]] = [
        (weights, prompt, expected[number, prompt])
        for number, weights in enumerate(MIXES)
        for prompt in PROMPTS
    ]
    calls += [(name, PROMPTS[0], expect(name, PROMPTS[0]).text) for name in (None, "dora", "plain")]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(lambda call: ask(http, call[0], call[1]), calls))
    for (adapter, prompt, text), answer in zip(calls, answers, strict=True):
        content = answer.raise_for_status().json()
        assert content["choices"][0]["text"] == text, (adapter, prompt)
        if isinstance(adapter, dict):
            assert content["adapter"] == [
                {"name": name, "digest": digests[name], "weight": weight}
                for name, weight in adapter.items()
            ]
    after = server.metric("requests_total", adapter="_mix", finish_reason="length")
    assert after - before == 2 * len(PROMPTS)


def test_the_prefix_cache_goes_by_the_mix(http):
    prompt = "prefix of a mix " * 4
    seen = []
    for adapter in (
        {"plain": 0.7, "rs": 0.3},
        {"plain": 0.3, "rs": 0.7},
        {"rs": 0.3, "plain": 0.7},
    ):
        usage = ask(http, adapter, prompt).raise_for_status().json()["usage"]
        seen.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert seen[:2] == [0, 0]
    assert seen[2] >= 48


@pytest.mark.parametrize("adapter", [{"dora": 0.5}, {"dora": 1, "plain": 0.1}], ids=str)
def test_what_is_not_linear_is_refused(http, adapter):
    answer = ask(http, adapter, "x")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "adapter_unsupported")
    assert error["param"] == "adapter"
    assert "'dora' cannot be part of a mix" in error["message"]
    assert "model.layers.0.self_attn.q_proj" in error["message"]
    assert "(DoRA)" in error["message"]
    record = http.get("/admin/adapters/dora").json()
    assert record["unmixable"] in error["message"]
    assert http.get("/admin/adapters/plain").json()["unmixable"] is None
    assert ask(http, {"dora": 1}, "x").status_code == 200


def test_every_adapter_of_a_mix_is_in_use(start, world: World):
    run = start("--adapter-slots=2").until_ready()
    with httpx.Client(base_url=run.url, timeout=60) as http, Background(run.url) as background:
        stream = background.stream(
            model=BASE,
            adapter={"plain": 0.5, "rs": 0.5},
            prompt="x",
            max_tokens=3000,
            ignore_eos=True,
        )
        assert stream.getresponse().read(1)
        for name in ("plain", "rs"):
            assert http.get(f"/admin/adapters/{name}").json()["in_use"] == 1
            assert http.delete(f"/admin/adapters/{name}").status_code == 409
            assert http.post(f"/admin/adapters/{name}/unload").status_code == 409
        refused = http.post("/admin/adapters/ada/pin")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_conflict")
        assert "a request that mixes adapters" in refused.json()["error"]["message"]
        http.post("/admin/adapters/rs/pin").raise_for_status()
        http.post("/admin/adapters/rs/unpin").raise_for_status()
        # Both slots are the mix's, and others still get their turns.
        for name in ("ada", "dora"):
            assert ask(http, name, "y", max_tokens=2).status_code == 200
        assert ask(http, {"ada": 1, "plain": 1}, "y", max_tokens=2).status_code == 200
        answer = ask(http, {"ada": 1, "plain": 1, "rs": 1}, "y")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
        assert "at most 2 are on the device at once" in answer.json()["error"]["message"]
    with httpx.Client(base_url=run.url, timeout=60) as http:
        http.post("/admin/adapters/ada/pin").raise_for_status()
        answer = ask(http, {"plain": 1, "rs": 1}, "y")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in answer.headers
        assert ask(http, {"plain": 1, "ada": 1}, "y", max_tokens=2).status_code == 200
