"""Files by the digest of their bytes: in a folder, and through fsspec in memory."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from manylora_store.blobs.interface import Blobs, IncomingFile
from manylora_store.blobs.local import LocalBlobs
from manylora_store.blobs.opening import open_blobs
from manylora_store.blobs.remote import RemoteBlobs
from manylora_store.errors import StoreError, StoreFullError, StoreUnavailableError
from manylora_store.records import BlobRef

CONTENT = b"some weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return f"{tmp_path}/blobs"
    return f"memory://{uuid.uuid4().hex}/blobs"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def blobs(url: str, scratch: Path) -> Blobs:
    @contextmanager
    def folder() -> Iterator[Path]:
        scratch.mkdir()
        yield scratch
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()

    return open_blobs(url, folder)


@pytest.fixture
def local(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "blobs")


def incoming(folder: Path, content: bytes = CONTENT) -> IncomingFile:
    path = folder / "incoming"
    path.write_bytes(content)
    return IncomingFile.measure(path)


def put(blobs: Blobs, folder: Path, content: bytes = CONTENT) -> BlobRef:
    file = incoming(folder, content)
    blobs.prepare(file)
    blobs.put(file)
    return file.ref


def read(blobs: Blobs, ref: BlobRef) -> bytes:
    with blobs.local_path(ref) as path:
        return path.read_bytes()


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_is_measured_by_its_bytes(tmp_path: Path) -> None:
    assert incoming(tmp_path).ref == BlobRef(DIGEST, len(CONTENT))
    assert incoming(tmp_path, b"").ref == BlobRef(hashlib.sha256().hexdigest(), 0)
    with pytest.raises(StoreUnavailableError, match=r"no such file.* cannot be used") as caught:
        IncomingFile.measure(tmp_path / "no such file")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_blob_is_what_was_put(blobs: Blobs, tmp_path: Path, scratch: Path) -> None:
    assert blobs.digests() == set()
    ref = put(blobs, tmp_path)
    assert ref.digest == DIGEST
    assert blobs.holds(ref)
    assert read(blobs, ref) == CONTENT
    assert not scratch.exists()
    empty = put(blobs, tmp_path, b"")
    assert read(blobs, empty) == b""
    assert blobs.digests() == {ref.digest, empty.digest}


def test_putting_a_blob_again_changes_nothing(blobs: Blobs, tmp_path: Path) -> None:
    put(blobs, tmp_path)
    ref = put(blobs, tmp_path)
    assert blobs.digests() == {DIGEST}
    assert read(blobs, ref) == CONTENT


def test_a_deleted_blob_is_gone(blobs: Blobs, tmp_path: Path) -> None:
    ref = put(blobs, tmp_path)
    blobs.delete(ref.digest)
    assert blobs.digests() == set()
    assert not blobs.holds(ref)
    with pytest.raises(StoreUnavailableError, match=DIGEST):
        read(blobs, ref)
    blobs.delete(ref.digest)


def test_a_blob_of_another_size_is_not_there(blobs: Blobs, tmp_path: Path) -> None:
    ref = put(blobs, tmp_path)
    other = BlobRef(ref.digest, ref.size + 1)
    assert not blobs.holds(other)
    with pytest.raises(StoreUnavailableError, match=DIGEST):
        read(blobs, other)


def test_a_blob_is_a_read_only_file_under_its_digest(local: LocalBlobs, tmp_path: Path) -> None:
    ref = put(local, tmp_path)
    path = tmp_path / "blobs" / "sha256" / DIGEST[:2] / DIGEST
    with local.local_path(ref) as found:
        assert found.samefile(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_file_becomes_a_blob_by_a_rename(local: LocalBlobs, tmp_path: Path) -> None:
    file = incoming(tmp_path)
    inode = file.path.stat().st_ino
    local.prepare(file)
    assert local.digests() == set()
    local.put(file)
    assert not file.path.exists()
    with local.local_path(file.ref) as path:
        assert path.stat().st_ino == inode


def test_a_blob_is_on_the_disk_before_it_has_its_name_and_its_name_is_before_put_returns(
    local: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"rename {source.name} to {target.name}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    put(local, tmp_path)
    assert done == [
        "sync incoming",
        "sync sha256",
        f"rename incoming to {DIGEST}",
        f"sync {DIGEST[:2]}",
    ]


def test_whoever_reads_a_blob_keeps_it(local: LocalBlobs, tmp_path: Path) -> None:
    ref = put(local, tmp_path)
    with local.local_path(ref) as path:
        local.delete(ref.digest)
        assert path.read_bytes() == CONTENT
        assert path.stat().st_size == ref.size
    assert not path.exists()


def test_strangers_among_the_blobs_are_none(local: LocalBlobs, tmp_path: Path) -> None:
    folder = tmp_path / "blobs" / "sha256"
    (folder / "00").mkdir()
    for stranger in ("README", f"00/{DIGEST}.part", "00/" + "0" * 63, "00/" + "F" * 64):
        (folder / stranger).touch()
    assert local.digests() == set()


@pytest.mark.parametrize("number", FULL)
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_a_full_disk_is_full(
    local: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    monkeypatch.setattr(call, failing(number))
    with pytest.raises(StoreFullError, match=rf"{tmp_path}.*make room there") as caught:
        put(local, tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert local.digests() == set()


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_a_broken_disk_is_unavailable(
    local: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(call, failing(errno.EIO))
    with pytest.raises(StoreUnavailableError, match=rf"{tmp_path}.*Input/output error") as caught:
        put(local, tmp_path)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError, match="file/blobs"):
        LocalBlobs(tmp_path / "file" / "blobs")


def test_uploads_are_received_where_a_rename_makes_them_blobs(
    local: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferred = tmp_path / "staging"
    preferred.mkdir()
    assert local.staging_root(preferred) == preferred
    monkeypatch.setattr(os, "rename", failing(errno.EXDEV))
    assert local.staging_root(preferred) == tmp_path / "blobs" / "staging"


def test_a_corrupt_object_is_refused_by_name(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"

    @contextmanager
    def folder() -> Iterator[Path]:
        yield tmp_path

    blobs = open_blobs(root, folder)
    ref = put(blobs, tmp_path)
    fs = fsspec.filesystem("memory")
    (path,) = fs.find(root)
    fs.pipe_file(path, CONTENT[::-1])
    with pytest.raises(StoreUnavailableError, match=rf"{DIGEST} at {root} is corrupt"):
        read(blobs, ref)


def test_an_upload_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"

    @contextmanager
    def folder() -> Iterator[Path]:
        yield tmp_path

    blobs = open_blobs(root, folder)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{root}/sha256/{DIGEST[:2]}/{DIGEST}", CONTENT[:3])
    assert blobs.digests() == {DIGEST}
    ref = put(blobs, tmp_path)
    assert read(blobs, ref) == CONTENT


def test_what_a_driver_raises_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DriverError(Exception):
        pass

    class BrokenFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
        error: Exception = DriverError("expired token")

        def info(self, path: str, **_: object) -> None:
            raise self.error

    @contextmanager
    def folder() -> Iterator[Path]:
        yield tmp_path

    fs = BrokenFileSystem()
    blobs = RemoteBlobs(fs, "bucket/x", "broken://bucket/x", folder)
    for error, expected in (
        (DriverError("expired token"), StoreUnavailableError),
        (PermissionError(errno.EACCES, "forbidden"), StoreUnavailableError),
        (OSError(errno.ENOSPC, "no space"), StoreFullError),
    ):
        monkeypatch.setattr(fs, "error", error)
        with pytest.raises(expected, match=rf"{DIGEST} at broken://bucket/x") as caught:
            put(blobs, tmp_path)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}"])
def test_folders_are_named_by_path_or_url(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "with space"
    blobs = open_blobs(form.format(folder), pytest.fail)
    assert isinstance(blobs, LocalBlobs)
    assert (folder / "sha256").is_dir()


@pytest.mark.parametrize("scheme", ["nonsense", "s3"])
def test_a_url_without_a_driver_is_refused_without_its_password(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(StoreError, match=rf"blobs cannot be at {scheme}://bucket/x: ") as caught:
        open_blobs(f"{scheme}://user:secret@bucket/x", pytest.fail)
    assert "secret" not in caught.value.message
