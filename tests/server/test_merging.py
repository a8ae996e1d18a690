"""Adapters are merged and unmerged over HTTP while a real server serves them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.adapters import lora, save_adapter
from support.admin import complete, digest_of, upload
from support.models import build_model
from support.server_process import Run, metric, wait_until
from support.world import NEW_TOKENS, PROMPTS, World

PROMPT = PROMPTS[1]


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("merging")
    run = world.serve(folder / "run", home=folder / "home")
    try:
        yield run.until_ready()
    finally:
        run.close()


@pytest.fixture
def http(run: Run) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=run.url, timeout=60) as http:
        yield http


def post(http: httpx.Client, name: str, action: str, body: Any = None) -> Any:
    return http.post(f"/admin/adapters/{name}/{action}", json=body).raise_for_status().json()


def text_of(response: httpx.Response) -> str:
    text: str = response.raise_for_status().json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_merge_and_unmerge(http: httpx.Client, expect: Any, precision: str) -> None:
    assert http.get("/admin/adapters/plain").json()["merged"] is None
    record = post(http, "plain", "merge", {"precision": precision})
    twin = record["twin"]
    assert record["merged"] == twin["precision"] == precision
    assert twin["delta_share"] == pytest.approx(1, abs=0.02)
    assert 0 < twin["error"]["kl_divergence"] < 0.05
    assert set(twin["step_times"]) == {"fused_ms", "merged_ms", "merged_at"}
    assert http.get("/admin/adapters/plain").json() == record
    stats = http.get("/admin/stats").json()["merging"]
    assert list(stats["twins"]) == [record["digest"]]
    assert stats["bytes"] == twin["bytes"] <= stats["bytes_limit"]
    answer = complete(http, "plain", PROMPT, NEW_TOKENS)
    assert text_of(answer)
    assert answer.json()["adapter"][0]["digest"] == record["digest"]
    record = post(http, "plain", "unmerge")
    assert (record["merged"], record["twin"]) == (None, None)
    assert post(http, "plain", "unmerge") == record
    assert text_of(complete(http, "plain", PROMPT, NEW_TOKENS)) == expect("plain", PROMPT).text


def test_answers_go_on_while_it_is_merged_a_few_times(
    run: Run, http: httpx.Client, expect: Any
) -> None:
    """The adapter's, others' and the base's: none fails, none changes, for a twin in 16 bits."""
    done = threading.Event()
    wrong: list[str] = []
    count = 0

    def ask(name: str | None, expected: str) -> None:
        nonlocal count
        with httpx.Client(base_url=run.url, timeout=60) as own:
            while not done.is_set():
                answer = complete(own, name, PROMPT, NEW_TOKENS)
                if answer.status_code != 200 or text_of(answer) != expected:
                    wrong.append(f"{name}: {answer.text}")
                count += 1

    threads = [
        threading.Thread(target=ask, args=(name, expect(kind, PROMPT).text))
        for name, kind in (("dora", "dora"), (None, None), ("rs", "rs"), ("plain", "plain"))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert post(http, "dora", "merge")["merged"] == "bf16"
            assert post(http, "dora", "unmerge")["merged"] is None
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert count > 20


def test_a_step_on_the_twin_is_counted(run: Run, http: httpx.Client) -> None:
    record = post(http, "rs", "merge", {"precision": "bf16"})
    before = metric(run.url, "merged_steps_total")
    complete(http, "rs", PROMPT, NEW_TOKENS).raise_for_status()
    used = metric(run.url, "merged_steps_total") - before
    stats = http.get("/admin/stats").json()["merging"]
    assert used + stats["fused_steps"] > 0
    assert metric(run.url, "twins") == 1
    assert metric(run.url, "twin_bytes") == record["twin"]["bytes"]
    post(http, "rs", "unmerge")
    assert metric(run.url, "twins") == 0


def test_a_twin_goes_with_its_revision(http: httpx.Client, tmp_path: Path) -> None:
    base = build_model("llama")
    first, second = (
        save_adapter(base, lora("llama"), tmp_path / str(seed), seed) for seed in (50, 51)
    )
    old = digest_of(first)
    upload(http, "tone", first).raise_for_status()
    assert post(http, "tone", "merge")["merged"] == "bf16"
    # Another revision under the name is another adapter; the old one's twin has no use any more.
    assert upload(http, "tone", second).raise_for_status().json()["merged"] is None
    wait_until(lambda: not _twins(http), "the twin of the revision before is dropped")
    assert post(http, "tone", "rollback", {"digest": old})["merged"] is None
    post(http, "tone", "merge", {"precision": "int8"})
    assert _twins(http) == [old]
    # Unloading frees it, and so does removing the name.
    assert post(http, "tone", "unload")["merged"] is None
    post(http, "tone", "merge", {"precision": "int8"})
    http.delete("/admin/adapters/tone").raise_for_status()
    wait_until(lambda: not _twins(http), "the twin of a removed adapter is dropped")


def _twins(http: httpx.Client) -> list[str]:
    return list(http.get("/admin/stats").json()["merging"]["twins"])


def test_too_little_memory(start: Callable[..., Run]) -> None:
    run = start("--merge-memory=1KiB").until_ready()
    response = httpx.post(f"{run.url}/admin/adapters/rs/merge", timeout=60)
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "adapter_conflict"
    assert "--merge-memory" in response.json()["error"]["message"]


def test_automatic_merging_explains_itself(start: Callable[..., Run]) -> None:
    run = start("--auto-merge").until_ready()
    automatic = httpx.get(f"{run.url}/admin/stats").json()["merging"]["automatic"]
    assert automatic["enabled"] is True
    assert automatic["last_decision"] is None
