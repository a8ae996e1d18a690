"""Adapters that are named: folders of this machine, and repositories of a hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from manylora_store.errors import AdapterInvalidError, StoreUnavailableError, TooLargeError
from manylora_store.intake.sources import fetch
from manylora_store.intake.staging import Staging
from unit.store.intake_support import BIN, CONFIG, WEIGHTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: bytes(range(200)), "README.md": b"read me"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path / "staging", 1000) as staging:
        yield staging


def content(staging: Staging) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in staging.path.iterdir()}


WANTED = {name: FILES[name] for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}", "file://localhost{}", "FILE:{}/"])
def test_a_folder_is_copied_but_for_what_is_no_adapter(
    form: str, folder: Path, staging: Staging
) -> None:
    assert fetch(form.format(folder), staging) == f"file:{folder}"
    assert content(staging) == WANTED
    assert staging.ignored == ()
    assert all(not path.is_symlink() for path in staging.path.iterdir())


def test_relative_and_home_folders(
    folder: Path, staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert fetch("adapter", staging) == f"file:{folder}"
    with Staging(folder.parent / "other", 1000) as second:
        assert fetch("file:~/adapter", second) == f"file:{folder}"


def test_a_pickle_is_copied_only_where_there_is_nothing_better(
    folder: Path, staging: Staging
) -> None:
    (folder / BIN).write_bytes(b"pickle")
    fetch(str(folder), staging)
    assert content(staging) == WANTED
    (folder / WEIGHTS).unlink()
    with Staging(folder.parent / "other", 1000) as second:
        fetch(str(folder), second)
        assert content(second) == {CONFIG: FILES[CONFIG], BIN: b"pickle"}


def test_links_to_files_are_followed_as_in_a_snapshot_of_the_hub(
    folder: Path, staging: Staging
) -> None:
    blob = folder.parent / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    fetch(str(folder), staging)
    assert content(staging) == WANTED


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_something_else_in_a_file_s_place(
    name: str, kind: str, folder: Path, staging: Staging
) -> None:
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(AdapterInvalidError, match=f"{name}.*not a regular file"):
        fetch(str(folder), staging)


def test_a_loop_of_links(folder: Path, staging: Staging) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)
    with pytest.raises(AdapterInvalidError, match=f"{CONFIG}.*cannot be read"):
        fetch(str(folder), staging)


def test_a_folder_with_too_much_is_not_even_begun(folder: Path, staging: Staging) -> None:
    os.truncate(folder / WEIGHTS, 1001)
    with pytest.raises(TooLargeError):
        fetch(str(folder), staging)
    assert WEIGHTS not in content(staging)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("s3://bucket/a", ("s3", "hf:org/repo")),
        ("https://host/a.zip", ("https", "hf:org/repo")),
        ("adapters:v1", ("adapters",)),
        ("", ("no folder",)),
        ("file:", ("no folder",)),
        ("file://host/a", ("'host'", "this machine")),
        ("file://host", ("'host'",)),
        ("/nowhere/at/all", ("no folder", "/nowhere/at/all")),
        (f"file:{__file__}", ("no folder",)),
        ("~nobody-of-this-name/x", ("~nobody-of-this-name/x",)),
        ("/x" * 5000, ("cannot be looked up",)),
        ("/a\0b", ("cannot be shown",)),
        ("/a\ud800", ("cannot be shown",)),
        ("hf:", ("hf:org/repo",)),
        ("hf:gpt2", ("hf:org/repo",)),
        ("hf:a/b/c", ("hf:org/repo",)),
        ("hf:../etc/passwd", ("hf:org/repo",)),
        ("hf:org/repo@", ()),
        ("hf:org/repo@../../x", ("hf:org/repo",)),
        ("hf:org/re po", ("hf:org/repo",)),
    ],
)
def test_a_source_that_names_nothing(source: str, names: tuple[str, ...], staging: Staging) -> None:
    with pytest.raises((AdapterInvalidError, StoreUnavailableError)) as caught:
        fetch(source, staging)
    for name in ("source", *names):
        assert name in caught.value.message
    assert content(staging) == {}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub, with one repository as huggingface_hub leaves it. No network."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    repository = root / "models--org--repo"
    snapshot = repository / "snapshots" / COMMIT
    for path in (snapshot, repository / "refs", repository / "blobs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, data in FILES.items():
        blob = repository / "blobs" / name.replace(".", "")
        blob.write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return root


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
@pytest.mark.usefixtures("cache")
def test_a_repository_in_the_cache_needs_no_hub(revision: str, staging: Staging) -> None:
    assert fetch(f"hf:org/repo{revision}", staging) == f"hf:org/repo@{COMMIT}"
    assert content(staging) == WANTED


@pytest.mark.parametrize("source", ["hf:org/other", "hf:org/repo@v2"])
@pytest.mark.usefixtures("cache")
def test_a_repository_out_of_reach_says_what_to_do(source: str, staging: Staging) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        fetch(source, staging)
    for name in (source, "HF_HUB_OFFLINE", "folder"):
        assert name in caught.value.message


class Hub(BaseHTTPRequestHandler):
    """The few calls of a hub that a download makes; every file of ``org/repo`` is one of FILES."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path.startswith("/api/models/org/repo/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in FILES.items()
            ]
            self._answer(200, json.dumps(listed).encode())
        elif path in ("/api/models/org/repo", "/api/models/org/repo/revision/main"):
            body = {"id": "org/repo", "sha": COMMIT, "siblings": []}
            self._answer(200, json.dumps(body).encode())
        elif path.startswith(f"/org/repo/resolve/{COMMIT}/"):
            self._answer(200, FILES[path.rpartition("/")[2]])
        elif path.startswith("/api/models/org/repo/revision/"):
            self._answer(404, b"{}", error="RevisionNotFound")
        elif path.startswith("/api/models/org/gated"):
            self._answer(403, b"{}", error="GatedRepo")
        else:
            self._answer(404, b"{}", error="RepoNotFound")

    def _answer(self, status: int, body: bytes, error: str | None = None) -> None:
        self.server.asked.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PROGRAM = """
import sys
from pathlib import Path
from manylora_store.errors import AdapterInvalidError, StoreError
from manylora_store.intake.sources import fetch
from manylora_store.intake.staging import Staging
with Staging(Path(sys.argv[1]), int(sys.argv[2])) as staging:
    try:
        print(fetch(sys.argv[3], staging))
        print(sorted((path.name, path.stat().st_size) for path in staging.path.iterdir()))
    except (AdapterInvalidError, StoreError) as error:
        print(type(error).__name__, error.message)
print(bool({'torch', 'peft'} & set(sys.modules)))
"""


def run(hub: ThreadingHTTPServer, home: Path, source: str, limit: int = 1000) -> list[str]:
    """Fetch ``source`` from ``hub`` in a process that is not offline; return what it printed."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home / "hf"),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, home / "staging", str(limit), source],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines.pop() == "False"
    return lines


def test_a_repository_of_a_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    source, files = run(hub, tmp_path, "hf:org/repo@main")
    assert source == f"hf:org/repo@{COMMIT}"
    assert files == str(sorted((name, len(data)) for name, data in WANTED.items()))
    assert not any("README" in call for call in hub.asked)  # type: ignore[attr-defined]


def test_a_repository_too_large_is_not_downloaded(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (answer,) = run(hub, tmp_path, "hf:org/repo", limit=100)
    assert answer.startswith("TooLargeError")
    assert not any(call.startswith("GET /org/repo") for call in hub.asked)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("hf:org/repo@v9", "no such branch"),
        ("hf:org/private", "HF_TOKEN"),
        ("hf:org/gated", "accept its terms"),
    ],
)
def test_what_the_hub_refuses(
    source: str, answer: str, hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    (line,) = run(hub, tmp_path, source)
    assert line.startswith("AdapterInvalidError")
    assert source in line
    assert answer in line
