"""Adapters come, change and go over HTTP while a real server serves them."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.adapters import lora, save_adapter
from support.admin import check_home, complete, digest_of, upload
from support.models import build_model, save_model
from support.server_process import Run, wait_until, wait_until_idle
from support.world import BASE, NEW_TOKENS, PROMPTS, Background, World

PROMPT = PROMPTS[2]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def empty(start: Callable[..., Run], world: World, home: Path) -> Callable[..., Run]:
    """Start a server without adapters, over a store of the test's own."""

    def starter(*arguments: str) -> Run:
        return start(str(world.base), *arguments, command="serve", home=home).until_ready()

    return starter


def client(run: Run) -> httpx.Client:
    return httpx.Client(base_url=run.url, timeout=60)


def stop(run: Run) -> None:
    run.send(signal.SIGTERM)
    assert run.finish() == 0, run.stderr


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def record(http: httpx.Client, name: str) -> dict[str, Any]:
    found = http.get(f"/admin/adapters/{name}").raise_for_status().json()
    assert isinstance(found, dict)
    return found


def test_an_upload_is_served_at_once_and_after_a_restart(empty, world: World, home, expect):
    run = empty()
    with client(run) as http:
        refused = complete(http, "legal", PROMPT, 4)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
        made = upload(http, "legal", world.adapters["dora"])
        assert made.status_code == 201, made.text
        told = made.json()
        assert told["digest"] == digest_of(world.adapters["dora"])
        assert (told["name"], told["peft_type"], told["rank"]) == ("legal", "LORA", 3)
        assert (told["residency"], told["pinned"], told["merged"]) == ("disk", False, None)
        assert (told["in_use"], told["source"], told["aliases"]) == (0, "upload", ["legal"])
        assert [r["digest"] for r in told["revisions"]] == [told["digest"]]
        assert told["parameters"] > 0
        assert set(told["ranks"].values()) == {3}
        receipt = told["receipt"]
        assert receipt["relative_logit_error"] < 1e-4
        assert receipt["effect"] > 0.01
        assert text_of(complete(http, "legal", PROMPT, NEW_TOKENS)) == expect("dora", PROMPT).text
        assert record(http, "legal")["residency"] == "device"
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == [BASE, "legal"]
        assert http.post("/admin/adapters/legal/pin").status_code == 200
    stop(run)
    assert check_home(home) == {"legal": told["digest"]}
    run = empty()
    with client(run) as http:
        # Pinned adapters come to the device by themselves.
        wait_until(lambda: record(http, "legal")["residency"] == "device", "the pinned adapter")
        again = record(http, "legal")
        assert again["pinned"] is True
        assert again["receipt"] == receipt
        assert text_of(complete(http, "legal", PROMPT, NEW_TOKENS)) == expect("dora", PROMPT).text


def test_new_content_under_a_name_and_back(empty, world: World, home, expect):
    run = empty()
    old, new = digest_of(world.adapters["plain"]), digest_of(world.adapters["rs"])
    with client(run) as http, Background(run.url) as background:
        upload(http, "tone", world.adapters["plain"]).raise_for_status()
        stream = background.stream(
            adapter="tone", prompt=PROMPT, max_tokens=1500, temperature=0, ignore_eos=True
        )
        response = stream.getresponse()
        first = json.loads(response.readline().removeprefix(b"data: "))
        assert first["adapter"][0]["digest"] == old

        made = upload(http, "tone", world.adapters["rs"])
        assert made.status_code == 201
        assert made.json()["digest"] == new
        assert [r["digest"] for r in made.json()["revisions"]] == [new, old]
        # New requests get the new revision, by its digest also the old one; the stream goes on.
        assert text_of(complete(http, "tone", PROMPT, NEW_TOKENS)) == expect("rs", PROMPT).text
        by_digest = complete(http, f"tone@{old[:8]}", PROMPT, NEW_TOKENS)
        assert text_of(by_digest) == expect("plain", PROMPT).text
        assert by_digest.json()["adapter"][0]["digest"] == old
        body = response.read().decode()
        chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        assert chunks, body
        assert {chunk["adapter"][0]["digest"] for chunk in chunks} == {old}
        streamed = first["choices"][0]["text"]
        streamed += "".join(choice["text"] for c in chunks for choice in c["choices"])
        assert streamed.startswith(expect("plain", PROMPT).text)

        rolled = http.post("/admin/adapters/tone/rollback", json={"digest": old[:12]})
        assert rolled.status_code == 200, rolled.text
        assert rolled.json()["digest"] == old
        assert text_of(complete(http, "tone", PROMPT, NEW_TOKENS)) == expect("plain", PROMPT).text
        missing = http.post("/admin/adapters/tone/rollback", json={"digest": "0" * 64})
        assert missing.status_code == 404
    stop(run)
    assert check_home(home) == {"tone": old}


def test_what_a_name_has_left_leaves_the_device(empty, world: World):
    run = empty()
    with client(run) as http:
        upload(http, "tone", world.adapters["plain"]).raise_for_status()
        complete(http, "tone", PROMPT, 2).raise_for_status()
        device = lambda: run.metric("adapter_residency", tier="device")  # noqa: E731
        wait_until(lambda: device() == 1, "it on the device")
        upload(http, "tone", world.adapters["rs"]).raise_for_status()
        complete(http, None, PROMPT, 1).raise_for_status()
        wait_until(lambda: device() == 0, "the old revision off the device")
        assert http.get("/admin/stats").json()["adapters"]["host"] == 0


def test_removal_waits_for_nobody_or_for_everybody(empty, world: World, home):
    run = empty()
    with client(run) as http, Background(run.url) as background:
        upload(http, "busy", world.adapters["plain"]).raise_for_status()
        stream = background.stream(
            adapter="busy", prompt=PROMPT, max_tokens=1500, temperature=0, ignore_eos=True
        )
        response = stream.getresponse()
        response.readline()
        for call in (
            http.delete("/admin/adapters/busy"),
            http.post("/admin/adapters/busy/unload"),
        ):
            assert (call.status_code, call.json()["error"]["code"]) == (409, "adapter_in_use")
        assert record(http, "busy")["in_use"] == 1

        removed: list[httpx.Response] = []
        drain = threading.Thread(
            target=lambda: removed.append(
                httpx.delete(f"{run.url}/admin/adapters/busy?drain=true", timeout=60)
            )
        )
        drain.start()
        refused = wait_until(
            lambda: r if (r := complete(http, "busy", "x", 1)).status_code != 200 else None,
            "new requests to be refused",
        )
        assert refused.status_code == 404
        assert removed == []
        body = response.read().decode()
        assert body.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in body.replace(" ", "")
        drain.join(60)
        assert removed[0].status_code == 200
        assert http.get("/admin/adapters/busy").status_code == 404
        assert http.delete("/admin/adapters/busy").status_code == 404
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == [BASE]
        wait_until_idle(run.url)
    stop(run)
    assert check_home(home) == {}


def test_load_unload_and_pins(empty, world: World):
    run = empty("--adapter-slots=2")
    with client(run) as http:
        for name, kind in (("a", "plain"), ("b", "rs"), ("c", "ada")):
            upload(http, name, world.adapters[kind]).raise_for_status()

        def tiers() -> dict[str, str]:
            data = http.get("/admin/adapters").json()["data"]
            return {entry["name"]: entry["residency"] for entry in data}

        assert tiers() == {"a": "disk", "b": "disk", "c": "disk"}
        assert run.metric("adapter_residency", tier="disk") == 3
        loaded = http.post("/admin/adapters/a/load", json={"pin": True})
        assert (loaded.json()["residency"], loaded.json()["pinned"]) == ("device", True)
        full = http.post("/admin/adapters/b/pin")
        assert (full.status_code, full.json()["error"]["code"]) == (409, "adapter_conflict")
        for name in ("b", "c", "b", "c"):
            complete(http, name, PROMPT, 2).raise_for_status()
        assert tiers() == {"a": "device", "b": "host", "c": "device"}
        listed = http.get("/admin/adapters", params={"residency": "host"}).json()
        assert [entry["name"] for entry in listed["data"]] == ["b"]
        pinned = http.post("/admin/adapters/a/unload")
        assert (pinned.status_code, pinned.json()["error"]["code"]) == (409, "adapter_conflict")
        assert http.post("/admin/adapters/a/unpin").json()["pinned"] is False
        for name in "abc":
            gone = http.post(f"/admin/adapters/{name}/unload")
            assert gone.json()["residency"] == "disk"
        assert set(tiers().values()) == {"disk"}
        assert http.post("/admin/adapters/nobody/load").status_code == 404


def test_the_calls_of_other_servers_tools(empty, world: World, expect):
    run = empty()
    with client(run) as http:
        path = str(world.adapters["plain"])
        body = {"lora_name": "compat", "lora_path": path}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        text = text_of(complete(http, "compat", PROMPT, NEW_TOKENS))
        assert text == expect("plain", PROMPT).text
        gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "compat"})
        assert gone.status_code == 200
        assert complete(http, "compat", PROMPT, 1).status_code == 404


def test_adapters_of_another_base_are_not_served(empty, world: World, tmp_path, start, home):
    run = empty()
    with client(run) as http:
        upload(http, "ours", world.adapters["plain"]).raise_for_status()
    stop(run)
    save_model("llama", tmp_path / "other", seed=5)
    other = start(str(tmp_path / "other"), command="serve", home=home).until_ready()
    with client(other) as http:
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["other"]
        refused = complete(http, "ours", PROMPT, 1)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "adapter_incompatible"
        assert http.post("/admin/adapters/ours/load").status_code == 422
        # It is still there, and uploading it anew checks it against this base.
        assert record(http, "ours")["residency"] == "disk"
        upload(http, "ours", world.adapters["plain"]).raise_for_status()
        complete(http, "ours", PROMPT, 1).raise_for_status()


def test_a_disconnected_upload_and_refused_ones_leave_nothing(empty, world: World, home):
    run = empty("--max-adapter-size=4MiB")
    folder = world.adapters["plain"]
    with client(run) as http, Background(run.url) as background:
        half = background.connect()
        half.putrequest("POST", "/admin/adapters")
        half.putheader("content-type", "multipart/form-data; boundary=xx")
        half.putheader("content-length", "4000000")
        half.endheaders()
        half.send(b'--xx\r\ncontent-disposition: form-data; name="files"; ')
        half.send(b'filename="adapter_model.safetensors"\r\n\r\n' + bytes(3_000_000))
        staging = home / "staging"
        wait_until(
            lambda: list(staging.rglob("adapter_model.safetensors")), "the half of an upload"
        )
        background.close()
        wait_until(
            lambda: not list(staging.rglob("adapter_model.safetensors")), "it to be cleared away"
        )
        big = http.post(
            "/admin/adapters",
            data={"name": "big"},
            files=[("files", ("adapter_model.safetensors", bytes(5_000_000)))],
        )
        assert (big.status_code, big.json()["error"]["code"]) == (413, "payload_too_large")
        config = (folder / "adapter_config.json").read_bytes()
        bad = http.post(
            "/admin/adapters",
            data={"name": "bad"},
            files=[
                ("files", ("adapter_config.json", config)),
                ("files", ("adapter_model.safetensors", b"\xff" * 64)),
            ],
        )
        assert (bad.status_code, bad.json()["error"]["code"]) == (422, "adapter_invalid")
        for name in ("a/b", "x" * 300, "", "..", "name with spaces"):
            refused = upload(http, name, folder)
            assert refused.status_code == 400, (name, refused.text)
            assert refused.json()["error"]["param"] == "name"
        assert http.get("/admin/adapters").json()["data"] == []
    stop(run)
    assert check_home(home) == {}


def test_memory_comes_back_after_unload(empty, world: World, tmp_path):
    """Of 24 adapters of 5 MB each, loaded and unloaded, less than a tenth stays."""
    base = build_model("llama")
    run = empty("--adapter-slots=24", "--max-sequences=24", "--adapter-host-memory=1GiB")
    names = [f"big{i}" for i in range(24)]
    with client(run) as http:

        def rss() -> int:
            return int(http.get("/admin/stats").json()["process"]["rss_bytes"])

        for seed, name in enumerate(names):
            config = lora("llama", r=512, target_modules="all-linear")
            upload(http, name, save_adapter(base, config, tmp_path / name, seed)).raise_for_status()
        for name in names[:2]:
            http.post(f"/admin/adapters/{name}/load").raise_for_status()
            http.post(f"/admin/adapters/{name}/unload").raise_for_status()
        before = rss()
        size = 0
        for name in names:
            http.post(f"/admin/adapters/{name}/load").raise_for_status()
            size += record(http, name)["bytes"]
        loaded = rss()
        # Once in host memory and once on the device, which is host memory, too.
        assert loaded - before > 1.5 * size
        for name in names:
            http.post(f"/admin/adapters/{name}/unload").raise_for_status()
        wait_until(lambda: rss() - before < 0.1 * (loaded - before), "the memory to come back", 20)


def test_the_command_line_registers_and_wins_at_start(empty, world: World, home):
    plain, rs = world.adapters["plain"], world.adapters["rs"]
    run = empty(f"--adapter=tone={plain}")
    with client(run) as http:
        assert upload(http, "tone", rs).status_code == 201
    stop(run)
    run = empty()
    with client(run) as http:
        assert record(http, "tone")["digest"] == digest_of(rs)
    stop(run)
    run = empty(f"--adapter=tone={plain}")
    with client(run) as http:
        assert record(http, "tone")["digest"] == digest_of(plain)
    stop(run)
    assert check_home(home) == {"tone": digest_of(plain)}
