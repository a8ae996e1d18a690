"""Multipart uploads taken apart: any order, any cut, and every way they can be wrong."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from manylora_server.api.uploads import Upload, receive_upload
from manylora_server.core.errors import ManyloraError
from manylora_server.core.staged import staged
from manylora_store.errors import StoreFullError, StoreUnavailableError
from manylora_store.intake.staging import Staging
from support.fake_adapters import FakeAdapterService, FakeStaging, Script

BOUNDARY = "the-boundary"
HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
CONFIG = ("files", "adapter_config.json", b'{"peft_type": "LORA"}')
WEIGHTS = ("files", "adapter_model.safetensors", bytes(range(256)) * 40)
ARCHIVE = ("archive", "tales.tar.gz", b"\x1f\x8b\x00\r\n--the-bound\r\n-- \r\n")
NAME = ("name", None, b"tales")

Part = tuple[str, str | None, bytes]


def encode(*parts: Part, end: bytes = b"--\r\n") -> bytes:
    body = bytearray()
    for field, filename, content in parts:
        disposition = f'form-data; name="{field}"'
        if filename is not None:
            disposition += f'; filename="{filename}"'
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
        body += content + b"\r\n"
    return bytes(body) + f"--{BOUNDARY}".encode() + end


@pytest.fixture
def api(make_api, tmp_path):
    """Every test also proves that no upload leaves anything behind."""
    api = make_api()
    api.service.root = tmp_path / "staging"
    api.service.root.mkdir()
    yield api
    assert list(api.service.root.iterdir()) == []


def upload(api, *parts: Part, body: bytes | None = None, headers: dict[str, str] = HEADERS):
    content = encode(*parts) if body is None else body
    return api.post("/admin/adapters", content=content, headers=headers)


def refused(api, error, response, param: str | None, status: int = 400) -> str:
    """Return the message of a refusal of ``param``."""
    assert response.status_code == status, response.text
    found = error(response)
    assert found["param"] == param
    assert not api.service.adapters
    return found["message"]


@pytest.mark.parametrize(
    "parts",
    [(NAME, CONFIG, WEIGHTS), (CONFIG, WEIGHTS, NAME), (WEIGHTS, NAME, CONFIG)],
    ids=["first", "last", "between"],
)
def test_the_name_may_come_anywhere(api, parts):
    response = upload(api, *parts)
    assert response.status_code == 201, response.text
    assert (response.json()["name"], response.json()["source"]) == ("tales", "upload")
    assert api.service.uploads == [
        ("tales", {CONFIG[1]: CONFIG[2], WEIGHTS[1]: WEIGHTS[2]}),
    ]


@pytest.mark.parametrize("parts", [(NAME, ARCHIVE), (ARCHIVE, NAME)])
def test_an_archive(api, parts):
    assert upload(api, *parts).status_code == 201
    assert api.service.uploads == [("tales", {"archive": ARCHIVE[2]})]


def test_as_clients_write_it(api):
    files = [("files", (name, content)) for _, name, content in (CONFIG, WEIGHTS)]
    response = api.post("/admin/adapters", data={"name": "tales"}, files=files)
    assert response.status_code == 201
    assert api.service.uploads[0][1][WEIGHTS[1]] == WEIGHTS[2]


def test_what_surrounds_the_parts_is_ignored(api):
    body = b"\r\n" + encode(NAME, CONFIG, WEIGHTS) + b"an epilogue"
    assert upload(api, body=body).status_code == 201


def test_a_quoted_boundary_in_capitals(api):
    headers = {"content-type": f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"'}
    assert upload(api, NAME, CONFIG, WEIGHTS, headers=headers).status_code == 201


def test_the_same_again_is_created_too(api):
    first, second = (upload(api, NAME, CONFIG, WEIGHTS) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ((CONFIG, WEIGHTS), "name"),
        ((NAME,), "files"),
        ((), "files"),
        ((NAME, CONFIG, ARCHIVE), "archive"),
        ((ARCHIVE, CONFIG, NAME), "archive"),
        ((NAME, ARCHIVE, ARCHIVE), "archive"),
        ((NAME, NAME, CONFIG), "name"),
        ((NAME, CONFIG, ("source", None, b"hf:x/y")), "source"),
        ((NAME, CONFIG, ("file", "adapter_model.safetensors", b"x")), "file"),
        ((NAME, ("files", None, b"x")), "files"),
        ((NAME, ("files", "", b"")), "files"),
        ((NAME, *[("files", f"{n}.bin", b"") for n in range(101)]), "files"),
        ((("name", None, b""), CONFIG), "name"),
        ((("name", None, b"a/b"), CONFIG), "name"),
        ((("name", None, b".."), CONFIG), "name"),
        ((("name", None, b"a" * 129), CONFIG), "name"),
        ((("name", None, b"a" * 300_000), CONFIG), "name"),
        ((("name", None, b"\xff\xfe"), CONFIG), "name"),
        ((CONFIG, ("name", None, b"tales\n")), "name"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_fields_at_fault(api, error, parts, param):
    message = refused(api, error, upload(api, *parts), param)
    assert message.lstrip("'").startswith(param)
    assert len(message) < 300


@pytest.mark.parametrize(
    "filename",
    ["../adapter_config.json", "a/adapter_config.json", "/etc/passwd", "..", ".", "a\\\\b"],
)
def test_file_names_with_a_path(api, error, filename):
    response = upload(api, NAME, ("files", filename, b"{}"))
    refused(api, error, response, "files", status=422)


def test_a_file_that_comes_twice(api, error):
    refused(api, error, upload(api, NAME, CONFIG, CONFIG), "files", status=422)


def test_a_file_name_that_is_no_text(api, error):
    body = encode(NAME, ("files", "X", b"")).replace(b'"X"', b'"\xff"')
    assert "UTF-8" in refused(api, error, upload(api, body=body), "files")


def test_what_the_service_refuses(api, error):
    response = upload(api, NAME, ("files", "a.bin", b""), ("files", "b.bin", b""))
    assert "adapter_config.json" in refused(api, error, response, "files", status=422)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 71}",
        f"multipart/form-data; bound={BOUNDARY}",
    ],
)
def test_no_boundary(api, error, content_type):
    response = upload(api, NAME, CONFIG, headers={"content-type": content_type})
    assert "boundary" in refused(api, error, response, None)


@pytest.mark.parametrize(
    "body",
    [
        b"not multipart at all",
        b"--another\r\n\r\n\r\n--another--",
        f"--{BOUNDARY}x".encode(),
        f"--{BOUNDARY}\r\nno colon\r\n\r\n--{BOUNDARY}--".encode(),
        f"--{BOUNDARY}\r\n\r\nno header\r\n--{BOUNDARY}--".encode(),
        f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n--{BOUNDARY}--".encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: file; name="name"\r\n\r\nx'.encode(),
        b"\r\n" * 100_000,
        f"--{BOUNDARY}\r\n".encode() + b"a: b\r\n" * 20_000,
        f"--{BOUNDARY}\r\nContent-Disposition: ".encode() + b"x" * 100_000,
    ],
    ids=lambda value: repr(value)[:50],
)
def test_malformed_bodies(api, error, body):
    refused(api, error, upload(api, body=body), None)


@pytest.mark.parametrize("kept", ["nothing", "a name", "half a file", "all but the end"])
def test_a_body_that_is_cut_off(api, error, kept):
    whole = encode(NAME, CONFIG, WEIGHTS)
    length = {
        "nothing": 0,
        "a name": whole.index(b"files"),
        "half a file": len(whole) - len(WEIGHTS[2]) // 2,
        "all but the end": len(whole) - len(b"--\r\n"),
    }[kept]
    param = "files" if kept in ("half a file", "all but the end") else None
    message = refused(api, error, upload(api, body=whole[:length]), param)
    assert "cut off" in message


def test_the_size_is_limited(api, error):
    api.service.script.upload_limit = 2 * 1024**2
    sent = 0

    async def chunks():
        nonlocal sent
        head = encode(NAME, ("files", "adapter_model.safetensors", b"X"), end=b"")
        yield head[: head.index(b"X")]
        for _ in range(1000):
            sent += 2**16
            yield b"\0" * 2**16

    response = api.post("/admin/adapters", content=chunks(), headers=HEADERS)
    message = refused(api, error, response, "files", status=413)
    assert str(2 * 1024**2) in message
    assert sent < 4 * 1024**2, "what is refused need not come"


def test_a_size_that_is_announced_need_not_come(api, error):
    api.service.script.upload_limit = 2 * 1024**2
    sent = 0

    async def chunks():
        nonlocal sent
        while True:
            sent += 1
            yield b"x"

    headers = {**HEADERS, "content-length": str(3 * 1024**2)}
    response = api.post("/admin/adapters", content=chunks(), headers=headers)
    refused(api, error, response, None, status=413)
    assert sent == 0


@pytest.mark.parametrize("failure", [StoreFullError("no room."), StoreUnavailableError("gone.")])
def test_a_store_that_cannot(api, error, failure):
    api.service.script.staging_fails = failure
    response = upload(api, NAME, CONFIG)
    assert refused(api, error, response, None, status=500) == failure.message


# What a file may hold that is nearly a boundary.
NEARLY = [b"\r", b"\n", b"\r\n", b"-", b"--", b"the-boundary", b"\r\n--the-boundar", b"x"]
CONTENTS = (
    st.lists(st.sampled_from(NEARLY))
    .map(b"".join)
    .filter(lambda content: b"\r\n--the-boundary" not in b"\r\n" + content)
)


@settings(max_examples=200, deadline=None)
@given(
    contents=st.lists(CONTENTS, min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 40)),
    position=st.integers(0, 4),
)
def test_cuts_do_not_matter(tmp_path_factory, contents, cuts, position):
    parts: list[Part] = [("files", f"f{n}", content) for n, content in enumerate(contents)]
    body = encode(*parts[:position], NAME, *parts[position:])
    with FakeStaging(tmp_path_factory.getbasetemp(), Script()) as staging:
        receiver = Upload(BOUNDARY.encode(), staging)
        for cut in cuts:
            receiver.feed(body[:cut])
            body = body[cut:]
        receiver.feed(body)
        assert receiver.finish() == "tales"
        receiver.close()
        assert staging.content() == {f"f{n}": content for n, content in enumerate(contents)}


class TestTheStoresOwnStaging:
    """What the service's fake does not check, and the real folder does."""

    @pytest.fixture
    def api(self, api, monkeypatch):
        monkeypatch.setattr(api.service, "stage", lambda: Staging(api.service.root, 100_000))
        monkeypatch.setattr(Staging, "content", FakeStaging.content, raising=False)
        return api

    def test_takes_an_adapter_s_files(self, api):
        readme = ("files", "README.md", b"not part of it")
        assert upload(api, CONFIG, readme, WEIGHTS, NAME).status_code == 201
        assert api.service.uploads == [
            ("tales", {CONFIG[1]: CONFIG[2], WEIGHTS[1]: WEIGHTS[2]}),
        ]

    def test_takes_an_archive(self, api):
        assert upload(api, ARCHIVE, NAME).status_code == 201
        assert api.service.uploads == [("tales", {"archive": ARCHIVE[2]})]

    @pytest.mark.parametrize("filename", ["../x", "a/b", "/x", "..", ".hidden", "a" * 300])
    def test_refuses_a_name_with_a_path(self, api, error, filename):
        refused(api, error, upload(api, NAME, ("files", filename, b"")), "files", status=422)

    def test_refuses_a_file_that_comes_twice(self, api, error):
        refused(api, error, upload(api, NAME, CONFIG, CONFIG), "files", status=422)

    @pytest.mark.parametrize(("size", "param"), [(100_001, "files"), (200_000, None)])
    def test_refuses_what_is_too_large(self, api, error, size, param):
        response = upload(api, NAME, ("files", "adapter_model.safetensors", bytes(size)))
        message = refused(api, error, response, param, status=413)
        assert "100000" in message


def request_of(receive) -> Request:
    scope: dict[str, Any] = {
        "type": "http",
        "headers": [(b"content-type", HEADERS["content-type"].encode())],
    }
    return Request(scope, receive)


def test_memory_does_not_grow_with_the_upload(tmp_path):
    total, chunk = 64 * 1024**2, bytes(2**18)
    head, _, tail = encode(NAME, ("files", "model", b"X")).partition(b"X")
    chunks = [head, *[chunk] * (total // len(chunk)), tail]

    async def receive():
        body = chunks.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(chunks)}

    async def scenario() -> int:
        with FakeStaging(tmp_path, Script()) as staging:
            assert await receive_upload(request_of(receive), staging) == "tales"
            return sum(path.stat().st_size for path in staging.path.iterdir())

    tracemalloc.start()
    try:
        assert asyncio.run(scenario()) == total
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 1024**2


def test_a_cancelled_upload_cleans_up_after_its_thread(tmp_path):
    """Cancelled in the middle of a write, it must not delete the folder under the writer."""
    writing, go_on = threading.Event(), threading.Event()
    service = FakeAdapterService()
    service.root = tmp_path
    wrote: list[bool] = []

    class SlowStaging(FakeStaging):
        def count(self, size: int) -> None:
            writing.set()
            assert go_on.wait(10)
            wrote.append(self.path.exists())

    service.stage = lambda: SlowStaging(tmp_path, service.script)  # type: ignore[method-assign]

    async def receive():
        return {"type": "http.request", "body": encode(NAME, CONFIG), "more_body": False}

    async def work() -> None:
        async with staged(service.stage) as staging:
            await receive_upload(request_of(receive), staging)

    async def scenario() -> None:
        task = asyncio.create_task(work())
        assert await asyncio.to_thread(writing.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert wrote == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_cancelled_is_not_reported_as_lost(tmp_path):
    service = FakeAdapterService()
    service.script.staging_fails = StoreFullError("no room.")

    async def work() -> None:
        async with staged(service.stage):
            raise AssertionError

    async def scenario() -> None:
        lost: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, ManyloraError)):
            await task
        assert lost == []

    asyncio.run(scenario())
