"""What goes wrong around a store: full disks, locks, lost files; and what is then left of it."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from manylora_store.blobs.local import LocalBlobs
from manylora_store.errors import (
    StoreBusyError,
    StoreFullError,
    StoreUnavailableError,
    UnknownRevisionError,
)
from manylora_store.records import BlobRef
from manylora_store.store import AdapterStore
from unit.store.conftest import OpenStore
from unit.store.small_adapters import blobs_in, leftovers_in, publish, record_of, staged
from unit.store.store_process import environment, running

# Largest file of the process, in bytes: room for a new registry, not for much in it.
FILE_LIMIT = 300_000

LIMITED = """
import json, resource, signal, sys
from pathlib import Path

from manylora_store.errors import StoreError
from manylora_store.store import AdapterStore
from unit.store.small_adapters import publish, write_adapter, record_of
from manylora_store.checkpoint.folder import open_folder

home, limit = Path(sys.argv[1]), int(sys.argv[2])
store = AdapterStore(home)
publish(store, "before", 1)
large = open_folder(write_adapter(home.parent / "large", 2, size=limit), "large", "elsewhere")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
said = []
try:
    store.publish("large", large, record_of(large))
except StoreError as error:
    said.append([type(error).__name__, error.message])
published = 1
try:
    for seed in range(3, 10_000):
        publish(store, f"name-{seed}", seed, source="s" * 4096)
        published += 1
except StoreError as error:
    said.append([type(error).__name__, error.message])
assert store.count() == published
assert store.get("before").source == "upload"
store.close()
print(json.dumps([said, published]))
"""

TORCH_FREE = """
import sys
for name in ("torch", "peft", "transformers", "numpy", "safetensors"):
    sys.modules[name] = None
from pathlib import Path

from manylora_store.store import AdapterStore
from unit.store.small_adapters import publish

with_torch = [name for name in sys.modules if name.partition(".")[0] == "torch"]
assert with_torch == ["torch"], with_torch
store = AdapterStore(Path(sys.argv[1]))
assert [record.name for record in store.list(limit=10)] == ["a"]
new = store.resolve("a").digest
(old,) = {ref.digest for ref in store.get("a").revisions} - {new}
assert store.rollback("a", old[:8]).record.digest == old
with store.files(old) as files:
    assert files.weights.header and files.config.rank == 1
assert publish(store, "b", 3).new_revision
assert store.remove("a") == {old, new}
store.close()
print("done")
"""


def run(program: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights_of(store: AdapterStore, name: str) -> Path:
    with store.files(store.get(name).digest) as files:
        return files.weights.path.resolve()


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_store_works_without_torch(home: Path) -> None:
    store = AdapterStore(home)
    publish(store, "a", 1)
    publish(store, "a", 2)
    store.close()
    assert run(TORCH_FREE, home) == "done\n"


def test_files_over_a_limit_leave_the_store_as_it_was(home: Path) -> None:
    # The kernel refuses the writes, for the copy of a large file and then for the registry's log.
    (large, registry), published = json.loads(run(LIMITED, home, FILE_LIMIT))
    assert large[0] == registry[0] == "StoreFullError"
    assert str(home / "staging") in large[1]
    assert "file size limit is reached; make room there" in large[1]
    assert str(home / "registry.sqlite3") in registry[1]
    assert "make room there" in registry[1]
    store = AdapterStore(home)
    assert store.count() == published
    # All share one configuration file.
    assert len(blobs_in(home)) == 1 + published
    assert leftovers_in(home) == []
    publish(store, "large", 2)
    store.close()


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_store_as_it_was(
    store: AdapterStore, home: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    before = publish(store, "a", 1).record
    blobs = blobs_in(home)
    with staged(store, 2) as files:
        monkeypatch.setattr(call, fail_with(number))
        with pytest.raises(StoreFullError, match="make room there"):
            store.publish("a", files, record_of(files))
        monkeypatch.undo()
    assert store.list(limit=10) == [before]
    assert blobs_in(home) == blobs
    assert leftovers_in(home) == []
    assert publish(store, "a", 2).previous == before.digest


def test_a_commit_that_fails_leaves_no_files(
    store: AdapterStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = sa.Connection.commit

    def fail_once(connection: sa.Connection) -> None:
        monkeypatch.setattr(sa.Connection, "commit", commit)
        raise sa.exc.OperationalError("COMMIT", None, OSError("gone"))

    with staged(store, 1) as files:
        monkeypatch.setattr(sa.Connection, "commit", fail_once)
        with pytest.raises(StoreUnavailableError):
            store.publish("a", files, record_of(files))
    assert store.count() == 0
    assert blobs_in(home) == set()


def test_a_busy_registry_leaves_the_upload_to_be_tried_again(
    open_store: OpenStore, registry_url: str, home: Path
) -> None:
    store = open_store(busy_timeout=0.2)
    old = publish(store, "a", 1).record
    with staged(store, 2) as files:
        with running("hold_the_writers_lock", home, registry_url):
            for change in (
                lambda: store.publish("a", files, record_of(files)),
                lambda: store.rollback("a", old.digest),
                lambda: store.point("b", old.digest, "alias"),
                lambda: store.set_pinned("a", True),
                lambda: store.remove("a"),
            ):
                with pytest.raises(StoreBusyError, match="try again"):
                    change()
            # Reading goes on, and so does opening: there is nothing to migrate or to sweep.
            assert open_store(busy_timeout=0.2).get("a") == old
            assert store.resolve("a").digest == old.digest
        assert store.publish("a", files, record_of(files)).previous == old.digest
    assert leftovers_in(home) == []


def test_a_removal_whose_files_stay_is_a_removal(
    store: AdapterStore,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest = publish(store, "a", 1).record.digest
    monkeypatch.setattr("pathlib.Path.unlink", fail_with(errno.EIO))
    with caplog.at_level(logging.WARNING):
        assert store.remove("a") == {digest}
    monkeypatch.undo()
    assert "could not be deleted; the next start tries again" in caplog.text
    assert "Input/output error" in caplog.text
    assert store.count() == 0
    assert len(blobs_in(home)) == 2
    assert store.sweep().blobs == 2
    assert blobs_in(home) == set()


@pytest.mark.parametrize("harm", ["missing", "truncated", "overwritten"])
def test_a_revision_whose_file_was_harmed_is_unavailable(store: AdapterStore, harm: str) -> None:
    digest = publish(store, "a", 1).record.digest
    path = weights_of(store, "a")
    if harm == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(content[:-1] if harm == "truncated" else b"\xff" * len(content))
    with pytest.raises(StoreUnavailableError, match=path.name), store.files(digest):
        pytest.fail("the file is harmed")
    assert store.get("a").digest == digest


def test_a_revision_removed_while_it_is_read_stays_readable(open_store: OpenStore) -> None:
    reader, remover = open_store(), open_store()
    digest = publish(reader, "a", 1).record.digest
    with reader.files(digest) as files:
        before = files.weights.path.read_bytes()
        remover.remove("a")
        assert files.weights.path.read_bytes() == before
    with pytest.raises(UnknownRevisionError, match=digest), reader.files(digest):
        pytest.fail("it is gone")


def test_a_revision_stored_anew_while_it_is_looked_for_is_found(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(store, "a", 1).record.digest
    local_path = LocalBlobs.local_path

    def republish_first(blobs: LocalBlobs, ref: BlobRef) -> AbstractContextManager[Path]:
        monkeypatch.setattr(LocalBlobs, "local_path", local_path)
        store.remove("a")
        lost = local_path(blobs, ref)
        with pytest.raises(StoreUnavailableError):
            lost.__enter__()
        # The same content in other bytes: other blobs.
        publish(store, "a", 1, padding=3)
        return local_path(blobs, ref)

    monkeypatch.setattr(LocalBlobs, "local_path", republish_first)
    with store.files(digest) as files:
        assert files.weights.header


def test_opening_sweeps_what_nothing_refers_to(open_store: OpenStore, home: Path) -> None:
    first = open_store()
    publish(first, "a", 1)
    kept = blobs_in(home)
    orphan = home / "blobs" / "sha256" / "00" / ("0" * 64)
    orphan.parent.mkdir(exist_ok=True)
    orphan.touch()
    open_store()
    assert blobs_in(home) == kept
    report = first.sweep()
    assert (report.blobs, report.staging_folders) == (0, 0)


def test_a_sweep_leaves_alone_what_a_living_process_has_staged(
    open_store: OpenStore, registry_url: str, home: Path
) -> None:
    store = open_store()
    with running("stay_in_staging", home, registry_url) as folder:
        open_store()
        assert store.sweep().staging_folders == 0
        assert (Path(folder) / "adapter_config.json").is_file()
    assert leftovers_in(home) == []


def test_blobs_on_another_file_system_are_still_renamed_into_place(
    open_store: OpenStore, home: Path
) -> None:
    blobs = Path("/dev/shm") / f"manylora-{os.getpid()}-{home.parent.name}"
    assert Path("/dev/shm").stat().st_dev != home.parent.stat().st_dev
    try:
        store = open_store(blobs_url=str(blobs))
        with staged(store, 1) as files:
            assert files.path.is_relative_to(blobs / "staging")
            inode = files.weights.path.stat().st_ino
            digest = store.publish("a", files, record_of(files)).record.digest
        with store.files(digest) as files:
            assert files.weights.path.stat().st_ino == inode
        assert list((blobs / "staging").iterdir()) == []
        store.remove("a")
    finally:
        subprocess.run(["rm", "-rf", str(blobs)], check=True)


def test_a_home_is_found_through_links(open_store: OpenStore, home: Path, tmp_path: Path) -> None:
    home.mkdir()
    link = tmp_path / "link"
    link.symlink_to(home)
    store = open_store(link)
    with staged(store, 1) as files:
        inode = files.weights.path.stat().st_ino
        store.publish("a", files, record_of(files))
    assert weights_of(store, "a").stat().st_ino == inode
