"""Whatever is wrong with an upload is told, and nothing else changes; over real HTTP."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, load_file, save

from support.world import World

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
Files = dict[str, bytes]


class Payload:
    """A pickle that would leave a mark if it were run."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._mark,))


def tensors(files: Files, change: Callable[[dict[str, torch.Tensor]], None]) -> Files:
    folder = load_tensors(files[WEIGHTS])
    change(folder)
    return {**files, WEIGHTS: save(folder)}


def load_tensors(data: bytes) -> dict[str, torch.Tensor]:
    return load(data)


def config(files: Files, **changes: Any) -> Files:
    raw = {**json.loads(files[CONFIG]), **changes}
    raw = {key: value for key, value in raw.items() if value is not ...}
    return {**files, CONFIG: json.dumps(raw).encode()}


def first(folder: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(name for name in sorted(folder) if part in name)


def zipped(members: list[tuple[str, bytes]], **options: Any) -> Files:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content, **options)
    return {"archive": data.getvalue()}


def linked(files: Files) -> Files:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        member = tarfile.TarInfo(CONFIG)
        member.size = len(files[CONFIG])
        archive.addfile(member, io.BytesIO(files[CONFIG]))
        link = tarfile.TarInfo(WEIGHTS)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return {"archive": data.getvalue()}


def bomb(files: Files) -> Files:
    zeros = bytes(2**20)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, files[CONFIG])
        with archive.open(WEIGHTS, "w") as member:
            for _ in range(200):
                member.write(zeros)
    assert len(data.getvalue()) < 300_000
    return {"archive": data.getvalue()}


def wrong_base(folder: dict[str, torch.Tensor]) -> None:
    name = first(folder)
    folder[name] = folder[name][:, :48].contiguous()


def not_finite(folder: dict[str, torch.Tensor]) -> None:
    folder[first(folder)][0, 0] = float("nan")


def missing(folder: dict[str, torch.Tensor]) -> None:
    del folder[first(folder, "lora_B")]


def extra(folder: dict[str, torch.Tensor]) -> None:
    folder["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.ones(4, 64)


BAD: dict[str, tuple[Callable[[Files], Files], str, str]] = {
    "for a base of another width": (
        lambda f: tensors(f, wrong_base),
        "adapter_incompatible",
        "[4, 64]",
    ),
    "a tensor missing": (
        lambda f: tensors(f, missing),
        "adapter_invalid",
        "lora_B.weight",
    ),
    "a tensor too many": (lambda f: tensors(f, extra), "adapter_invalid", "k_proj"),
    "not a number": (lambda f: tensors(f, not_finite), "adapter_invalid", "lora_A"),
    "cut short": (lambda f: {**f, WEIGHTS: f[WEIGHTS][:-100]}, "adapter_invalid", WEIGHTS),
    "a header that lies": (
        lambda f: {**f, WEIGHTS: struct.pack("<Q", 2**40) + f[WEIGHTS][8:]},
        "adapter_invalid",
        WEIGHTS,
    ),
    "an absurd rank": (lambda f: config(f, r=10**9), "adapter_invalid", "r is"),
    "a Git LFS pointer": (lambda f: {**f, WEIGHTS: LFS}, "adapter_invalid", "LFS"),
    "no peft_type": (lambda f: config(f, peft_type=...), "adapter_invalid", "peft_type"),
    "a type that is not served": (
        lambda f: config(f, peft_type="IA3"),
        "adapter_unsupported",
        "IA3",
    ),
    "no configuration": (lambda f: {WEIGHTS: f[WEIGHTS]}, "adapter_invalid", CONFIG),
    "no weights": (lambda f: {CONFIG: f[CONFIG]}, "adapter_invalid", WEIGHTS),
    "a path out of the archive": (
        lambda f: zipped([(CONFIG, f[CONFIG]), (f"../{WEIGHTS}", f[WEIGHTS])]),
        "adapter_invalid",
        "../",
    ),
    "one file twice": (
        lambda f: zipped([(CONFIG, f[CONFIG]), (WEIGHTS, f[WEIGHTS]), (f"./{CONFIG}", b"{}")]),
        "adapter_invalid",
        CONFIG,
    ),
    "a link": (linked, "adapter_invalid", WEIGHTS),
    "a bomb": (bomb, "adapter_invalid", "archive"),
    "no archive at all": (lambda f: {"archive": b"PK" + bytes(100)}, "adapter_invalid", "archive"),
}


@pytest.fixture
def sound(world: World) -> Files:
    return {name: (world.adapters["plain"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture(autouse=True)
def nothing_changes(http: httpx.Client, world: World) -> Iterator[None]:
    """The registry and the store's files are the same before and after."""

    def state() -> tuple[Any, list[Path]]:
        listed = http.get("/admin/adapters").raise_for_status().json()
        kept = [*(world.home / "blobs").rglob("*"), *(world.home / "staging").rglob("*")]
        names = {e["name"]: (e["digest"], e["revisions"]) for e in listed["data"]}
        return names, sorted(path for path in kept if path.suffix != ".lock")

    before = state()
    yield
    assert state() == before


def post(http: httpx.Client, name: str, files: Files) -> httpx.Response:
    if "archive" in files:
        parts = [("archive", ("adapter.zip", files["archive"]))]
    else:
        parts = [("files", (file, content)) for file, content in files.items()]
    return http.post("/admin/adapters", data={"name": name}, files=parts)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_with_its_reason(
    kind: str, http: httpx.Client, sound: Files
) -> None:
    make, code, told = BAD[kind]
    answer = post(http, "fresh", make(sound))
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert told in error["message"]
    assert http.get("/admin/adapters/fresh").status_code == 404


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_revision_leaves_the_one_there_is(
    kind: str, http: httpx.Client, sound: Files
) -> None:
    assert post(http, "plain", BAD[kind][0](sound)).status_code == 422


def test_code_in_a_pickle_is_not_run(http: httpx.Client, sound: Files, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = pickle.dumps({"base_model.model.x": Payload(mark)})
    whole = io.BytesIO()
    torch.save({"base_model.model.x": Payload(mark)}, whole)
    for content in (evil, whole.getvalue()):
        answer = post(http, "fresh", {CONFIG: sound[CONFIG], BIN: content})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_invalid")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "", "..", ".hidden", "naïve", "a\nb"])
def test_a_bad_name_is_refused(name: str, http: httpx.Client, sound: Files) -> None:
    answer = post(http, name, sound)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")


def test_the_same_tensors_in_a_bin_file_are_the_same_adapter(
    http: httpx.Client, world: World, sound: Files
) -> None:
    data = io.BytesIO()
    torch.save(load_file(world.adapters["plain"] / WEIGHTS), data)
    answer = post(http, "plain", {CONFIG: sound[CONFIG], BIN: data.getvalue()})
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == http.get("/admin/adapters/plain").json()["digest"]
