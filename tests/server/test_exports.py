"""Exports of a real server: followed, cancelled, crashed, while requests are served."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora_server.export.output import PREFIX
from support.admin import check_home, complete
from support.exporting import assert_same, load, with_peft
from support.server_process import Run, wait_until
from support.world import NEW_TOKENS, World

Start = Callable[..., Run]


def begin(run: Run, output: str, **changes: Any) -> dict[str, Any]:
    body = {"adapters": {"plain": 1.0}, "output": output, **changes}
    response = httpx.post(f"{run.url}/admin/exports", json=body, timeout=60)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def writing(home: Path) -> Path:
    """Wait until an export has written its weights, and return its folder."""
    found = wait_until(
        lambda: list((home / "exports").glob(f"{PREFIX}*/model.safetensors")), "the first file"
    )
    path: Path = found[0].parent
    return path


def test_requests_are_answered_while_an_export_is_followed_to_its_end(
    start: Start, world: World, tmp_path: Path, expect: Any
) -> None:
    run = start().until_ready()
    job = begin(run, "merged", dtype="fp32")
    events = []
    with (
        httpx.Client(base_url=run.url, timeout=60) as http,
        http.stream("GET", f"/admin/exports/{job['id']}/events", timeout=120) as stream,
    ):
        lines = stream.iter_lines()
        events.append(json.loads(next(lines).removeprefix("data: ")))
        answer = complete(http, "rs", "Hello", NEW_TOKENS).raise_for_status().json()
        assert answer["choices"][0]["text"] == expect("rs", "Hello").text
        told = [line.removeprefix("data: ") for line in lines if line]
    assert told.pop() == "[DONE]"
    events += map(json.loads, told)
    assert events[0]["id"] == events[-1]["id"] == job["id"]
    shares = [event["progress"] for event in events]
    assert shares == sorted(shares)
    done = events[-1]
    assert (done["state"], done["progress"]) == ("done", 1.0), done
    # What is served is in 4 bits; the export is made from the dense original.
    path = Path(done["path"])
    assert path == tmp_path / "home" / "exports" / "merged"
    assert_same(load(path), with_peft(world.base, world.adapters["plain"]))
    equivalence = done["report"]["equivalence"]
    assert equivalence["same_base"]["max_relative_error"] < 1e-4
    assert equivalence["served"]["base"].startswith("nf4")
    again = httpx.post(
        f"{run.url}/admin/exports", json={"adapters": {"plain": 1.0}, "output": "merged"}
    )
    assert again.status_code == 400
    assert again.json()["error"]["param"] == "output"


def test_a_cancelled_export_leaves_nothing(start: Start, tmp_path: Path) -> None:
    run = start().until_ready()
    job = begin(run, "merged")
    folder = writing(tmp_path / "home")
    response = httpx.delete(f"{run.url}/admin/exports/{job['id']}", timeout=60)
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert not folder.exists()
    assert list((tmp_path / "home" / "exports").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_in_an_export_leaves_nothing_for_long(
    number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    run = start().until_ready()
    begin(run, "merged")
    folder = writing(home)
    run.send(number)
    run.finish()
    assert folder.exists() == (number == signal.SIGKILL)
    assert not (home / "exports" / "merged").exists()
    run = start().until_ready()
    assert list((home / "exports").iterdir()) == []
    assert httpx.get(f"{run.url}/admin/exports").json()["data"] == []
    run.send(signal.SIGTERM)
    assert run.finish() == 0
    assert set(check_home(home)) == {"ada", "dora", "plain", "rs"}
