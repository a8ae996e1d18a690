"""A store whose files are elsewhere: downloaded when they are read, checked, and swept up."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from manylora_store.blobs.remote import RemoteBlobs
from manylora_store.errors import StoreBusyError, StoreError, StoreUnavailableError
from manylora_store.store import AdapterStore
from unit.store.conftest import OpenStore
from unit.store.small_adapters import leftovers_in, publish, record_of, staged, write_adapter
from unit.store.store_process import running


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/blobs"


@pytest.fixture
def store(open_store: OpenStore, url: str) -> AdapterStore:
    return open_store(blobs_url=url)


def objects(url: str) -> set[str]:
    found = fsspec.filesystem("memory").find(url)
    return {path.rpartition("/")[2] for path in found}


def test_files_are_downloaded_while_they_are_read(
    store: AdapterStore, url: str, home: Path, tmp_path: Path
) -> None:
    original = write_adapter(tmp_path / "original", 1) / "adapter_model.safetensors"
    digest = publish(store, "a", 1).record.digest
    assert len(objects(url)) == 2
    assert not (home / "blobs").exists()
    with store.files(digest) as files:
        assert files.weights.path.is_relative_to(home)
        assert files.weights.path.read_bytes() == original.read_bytes()
    assert leftovers_in(home) == []


def test_a_restart_and_a_removal(open_store: OpenStore, store: AdapterStore, url: str) -> None:
    publish(store, "a", 1)
    publish(store, "a", 2)
    again = open_store(blobs_url=url)
    assert again.get("a") == store.get("a")
    assert len(objects(url)) == 3
    again.remove("a")
    assert objects(url) == set()


def test_a_corrupt_object_is_named(store: AdapterStore, url: str) -> None:
    digest = publish(store, "a", 1).record.digest
    fs = fsspec.filesystem("memory")
    weights = max(fs.find(url), key=fs.size)
    fs.pipe_file(weights, bytes(fs.size(weights)))
    blob = weights.rpartition("/")[2]
    with pytest.raises(StoreUnavailableError, match=rf"blob {blob} at memory:.* is corrupt"):
        store.files(digest).__enter__()


def test_an_upload_swept_away_before_its_commit_is_uploaded_again(
    open_store: OpenStore, store: AdapterStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = RemoteBlobs.prepare

    def prepare_and_lose(blobs: RemoteBlobs, file: object) -> bool:
        done = prepare(blobs, file)  # type: ignore[arg-type]
        # Another process starts; nothing refers to the object yet.
        monkeypatch.setattr(RemoteBlobs, "prepare", prepare)
        open_store(blobs_url=url)
        assert objects(url) == set()
        return done

    monkeypatch.setattr(RemoteBlobs, "prepare", prepare_and_lose)
    digest = publish(store, "a", 1).record.digest
    with store.files(digest) as files:
        assert files.config.rank == 1


def test_an_upload_that_fails_leaves_no_objects(
    store: AdapterStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "a", 1)
    before = objects(url)
    puts = []

    def lose_connection(fs: object, local: str, remote: str) -> None:
        puts.append(remote)
        raise ConnectionError("lost")

    with staged(store, 2) as files:
        monkeypatch.setattr(
            "fsspec.implementations.memory.MemoryFileSystem.put_file", lose_connection
        )
        with pytest.raises(StoreUnavailableError, match="memory://"):
            store.publish("b", files, record_of(files))
        monkeypatch.undo()
    assert len(puts) == 1
    assert objects(url) == before
    assert store.count() == 1


def test_an_upload_that_never_got_its_turn_is_swept(
    open_store: OpenStore, url: str, home: Path, registry_url: str
) -> None:
    store = open_store(blobs_url=url, busy_timeout=0.2)
    with (
        running("hold_the_writers_lock", home, registry_url),
        pytest.raises(StoreBusyError),
    ):
        publish(store, "a", 1)
    assert store.sweep().blobs == len({"configuration", "weights"})
    assert objects(url) == set()


def test_a_url_at_fault_leaves_no_open_registry(open_store: OpenStore, home: Path) -> None:
    with pytest.raises(StoreError, match="blobs cannot be at"):
        open_store(blobs_url="nonsense://bucket")
    assert not (home / "registry.sqlite3").exists()
