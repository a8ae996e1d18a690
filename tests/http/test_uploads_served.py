"""Uploads over a socket: written while they come, refused early, or left by their client."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from support.fake_engine import FakeEngine
from support.server_process import served, wait_until

MIB = 1024**2
BOUNDARY = "the-boundary"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    engine = FakeEngine()
    engine.adapter_service.root = tmp_path / "staging"
    engine.adapter_service.root.mkdir()
    return engine


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with served(engine) as url:
        yield url


def part(field: str, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    disposition = f'Content-Disposition: form-data; name="{field}"{more}'
    return f"\r\n--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode()


def connect(url: str, length: int) -> socket.socket:
    """Open a connection and announce an upload of ``length`` bytes."""
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=30)
    head = f"POST /admin/adapters HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: {TYPE}\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
    return connection


def staged_bytes(engine: FakeEngine) -> int:
    root = engine.adapter_service.root
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


HALF = bytes(4 * MIB)
START = part("files", "adapter_model.safetensors") + HALF
END = HALF + part("name") + f"tales\r\n--{BOUNDARY}--\r\n".encode()


def test_files_are_written_while_they_come(engine, url):
    with connect(url, len(START) + len(END)) as connection:
        connection.sendall(START)
        wait_until(lambda: staged_bytes(engine) >= len(HALF) - 2 * MIB, "the first half on disk")
        connection.sendall(END)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 201
        assert json.loads(response.read())["name"] == "tales"
    assert list(engine.adapter_service.root.iterdir()) == []
    [(name, content)] = engine.adapter_service.uploads
    assert (name, len(content["adapter_model.safetensors"])) == ("tales", 2 * len(HALF))


def test_a_client_that_goes_leaves_nothing(engine, url):
    with connect(url, len(START) + len(END)) as connection:
        connection.sendall(START)
        wait_until(lambda: staged_bytes(engine) > 0, "something on disk")
    root = engine.adapter_service.root
    wait_until(lambda: not list(root.iterdir()), "an empty staging folder")
    assert not engine.adapter_service.uploads
    assert httpx.get(f"{url}/admin/adapters").json()["data"] == []


@pytest.fixture(params=["a bad name", "a field", "the size", "the address"])
def refused(request, engine, monkeypatch) -> tuple[bytes, int, str]:
    """Something to refuse at the very start, and the answer that is due."""
    if request.param == "a bad name":
        return part("name") + b"a/b", 400, "invalid_request"
    if request.param == "a field":
        return part("nothing") + b"x", 400, "invalid_request"
    if request.param == "the size":
        engine.adapter_service.script.upload_limit = 1000
        return part("name") + b"tales", 413, "payload_too_large"
    monkeypatch.setattr("manylora_server.api.loopback.is_loopback", lambda host: False)
    return part("name") + b"tales", 403, "forbidden"


class TestAnUploadThatIsRefusedEarly:
    """The client still sends tens of megabytes, and must get its answer, not a broken pipe."""

    REST = 32 * MIB

    def body(self, start: bytes) -> bytes:
        return start + part("files", "m") + bytes(self.REST) + f"\r\n--{BOUNDARY}--".encode()

    @pytest.mark.parametrize("announced", [True, False])
    def test_by_httpx(self, engine, url, refused, announced):
        start, status, code = refused
        body = self.body(start)
        content = body if announced else iter([body[n : n + MIB] for n in range(0, len(body), MIB)])
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(2):
                response = client.post(
                    "/admin/adapters", content=content, headers={"content-type": TYPE}
                )
                assert response.status_code == status
                assert response.json()["error"]["code"] == code
                content = body
            # The connection, or a new one, goes on.
            assert client.get("/version").status_code == 200
        assert list(engine.adapter_service.root.iterdir()) == []

    def test_by_a_client_that_reads_when_it_has_sent_all(self, url, refused):
        start, status, code = refused
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        for _ in range(2):
            connection.request("POST", "/admin/adapters", self.body(start), {"content-type": TYPE})
            response = connection.getresponse()
            assert response.status == status
            assert json.loads(response.read())["error"]["code"] == code
        connection.close()

    def test_by_one_that_waits_to_be_told_to_continue(self, url, refused):
        start, status, code = refused
        body = self.body(start)
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=60) as connection:
            connection.sendall(
                f"POST /admin/adapters HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: {TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
            )
            reader = connection.makefile("rb")
            status_line = reader.readline()
            if b" 100 " in status_line:
                assert code != "forbidden", "no body is asked for in vain"
                assert reader.readline() == b"\r\n"
                connection.sendall(body)
                status_line = reader.readline()
            assert f" {status} ".encode() in status_line
            length = http.client.parse_headers(reader)["content-length"]
            assert json.loads(reader.read(int(length)))["error"]["code"] == code
