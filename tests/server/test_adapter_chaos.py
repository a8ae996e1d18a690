"""Everything at once over one name, and a process killed in the middle: never a mixture."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from support.admin import check_home, complete, digest_of, upload
from support.server_process import Run, wait_until_idle
from support.world import NEW_TOKENS, PROMPTS, World

KINDS = ("ada", "dora", "plain", "rs")
NAME = "hot"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def empty(start: Callable[..., Run], world: World, home: Path) -> Callable[[], Run]:
    def starter() -> Run:
        return start(str(world.base), "--adapter-slots=2", command="serve", home=home).until_ready()

    return starter


def test_two_hundred_uploads_deletes_and_completions_at_once(
    empty: Callable[[], Run], world: World, expect, home: Path
) -> None:
    run = empty()
    kinds = {digest_of(world.adapters[kind]): kind for kind in KINDS}
    texts = {(kind, prompt): expect(kind, prompt).text for kind in KINDS for prompt in PROMPTS[:3]}
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    rng = random.Random(7)
    jobs = ["upload"] * 75 + ["delete"] * 12 + ["drain"] * 3 + ["rollback"] * 10
    jobs += ["complete"] * 100
    rng.shuffle(jobs)
    plan = [(job, rng.choice(KINDS), rng.choice(PROMPTS[:3])) for job in jobs]

    def work(job: str, kind: str, prompt: str) -> None:
        with httpx.Client(base_url=run.url, timeout=120) as http:
            path = f"/admin/adapters/{NAME}"
            if job == "complete":
                answer = complete(http, NAME, prompt, NEW_TOKENS)
                if answer.status_code == 200:
                    [used] = answer.json()["adapter"]
                    text = answer.json()["choices"][0]["text"]
                    if text != texts[kinds[used["digest"]], prompt]:
                        wrong.append(f"{used} answered {text!r} to {prompt!r}")
            elif job == "upload":
                answer = upload(http, NAME, world.adapters[kind])
                if answer.status_code == 201 and kinds[answer.json()["digest"]] != kind:
                    wrong.append(f"an upload of {kind} became {answer.json()['digest']}")
            elif job == "rollback":
                body = {"digest": digest_of(world.adapters[kind])}
                answer = http.post(f"{path}/rollback", json=body)
            else:
                answer = http.delete(path, params={"drain": "true"} if job == "drain" else {})
        code = "" if answer.is_success else answer.json()["error"]["code"]
        seen[f"{job} {answer.status_code} {code}".rstrip()] += 1

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda item: work(*item), plan))
    due = {
        "complete 200",
        "complete 404 adapter_not_found",
        "upload 201",
        # Somebody waits for its running requests, to remove it.
        "upload 409 adapter_conflict",
        "delete 200",
        "delete 404 adapter_not_found",
        "delete 409 adapter_in_use",
        "delete 409 adapter_conflict",
        "drain 200",
        "drain 404 adapter_not_found",
        "drain 409 adapter_conflict",
        "rollback 200",
        "rollback 404 adapter_not_found",
        "rollback 409 adapter_conflict",
    }
    assert wrong == []
    assert set(seen) <= due, seen
    # How many depends on the machine; none at all would show nothing.
    assert seen["complete 200"], seen
    assert seen["upload 201"], seen
    wait_until_idle(run.url)
    assert "Traceback" not in run.stderr
    with httpx.Client(base_url=run.url, timeout=60) as http:
        upload(http, NAME, world.adapters["rs"]).raise_for_status()
        answer = complete(http, NAME, PROMPTS[2], NEW_TOKENS)
        assert answer.json()["choices"][0]["text"] == texts["rs", PROMPTS[2]]
    run.send(signal.SIGTERM)
    assert run.finish() == 0
    assert check_home(home) == {NAME: digest_of(world.adapters["rs"])}


def test_a_process_killed_in_the_middle_of_uploads_starts_again_with_the_old_or_the_new(
    empty: Callable[[], Run], world: World, home: Path
) -> None:
    rng = random.Random(3)
    digests = {kind: digest_of(world.adapters[kind]) for kind in KINDS}
    possible: dict[str, set[str | None]] = {"kept": {None}, NAME: {None}}
    run = empty()
    with httpx.Client(base_url=run.url, timeout=60) as http:
        upload(http, "kept", world.adapters["dora"]).raise_for_status()
    possible["kept"] = {digests["dora"]}
    for _ in range(6):
        asked: list[str | None] = []

        def churn(url: str = run.url, asked: list[str | None] = asked) -> None:
            with httpx.Client(base_url=url, timeout=60) as http:
                try:
                    while True:
                        kind = rng.choice(KINDS)
                        asked.append(digests[kind])
                        upload(http, NAME, world.adapters[kind])
                        if rng.random() < 0.3:
                            asked.append(None)
                            http.delete(f"/admin/adapters/{NAME}")
                except httpx.TransportError:
                    return

        thread = threading.Thread(target=churn)
        thread.start()
        time.sleep(rng.uniform(0.05, 0.8))
        run.send(signal.SIGKILL)
        run.finish()
        thread.join(60)
        possible[NAME] = {*possible[NAME], *asked}
        run = empty()
        with httpx.Client(base_url=run.url, timeout=60) as http:
            data = http.get("/admin/adapters").json()["data"]
            found = {entry["name"]: entry["digest"] for entry in data}
            for name, digest in found.items():
                assert digest in possible[name]
                # Whatever it is, it is whole: it can be served.
                answer = complete(http, name, PROMPTS[0], 2)
                assert answer.status_code == 200, answer.text
                assert answer.json()["adapter"][0]["digest"] == digest
        assert found["kept"] == digests["dora"]
        assert set(found) <= {"kept", NAME}
    run.send(signal.SIGTERM)
    assert run.finish() == 0
    check_home(home)
