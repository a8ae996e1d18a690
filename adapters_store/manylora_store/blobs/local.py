"""Blobs as files of this machine, or of a file system it has mounted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora_store.blobs.interface import DIGEST, IncomingFile
from manylora_store.errors import StoreUnavailableError
from manylora_store.records import BlobRef
from manylora_store.storage_failures import storage_error, storage_errors


class LocalBlobs:
    """``Blobs`` in a folder: read-only files that were complete before they got their name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = root / "sha256"
        with storage_errors(self._files):
            self._files.mkdir(parents=True, exist_ok=True)

    def staging_root(self, preferred: Path) -> Path:
        """Return ``preferred`` if ``put`` can rename files from there, else a folder where it can.

        Mounts are asked, not device numbers, which bind mounts of one disk share: Linux looks at
        the mounts before it looks for the file.
        """
        try:
            os.rename(preferred / "no such file", self._files / "no such file")
        except OSError as error:
            if error.errno == errno.EXDEV:
                return self._root / "staging"
        return preferred

    def prepare(self, file: IncomingFile) -> bool:
        """Make the file read-only, and sure to outlive a power failure under whatever name."""
        with storage_errors(file.path):
            descriptor = os.open(file.path, os.O_RDONLY)
            try:
                os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return False

    def put(self, file: IncomingFile) -> None:
        """Rename the file to its digest. A blob that is there already is replaced by its equal."""
        target = self._path(file.ref.digest)
        with storage_errors(target):
            try:
                target.parent.mkdir()
            except FileExistsError:
                pass
            else:
                _sync_folder(self._files)
            os.replace(file.path, target)
            _sync_folder(target.parent)

    def holds(self, ref: BlobRef) -> bool:
        """Return whether the blob exists with its size."""
        path = self._path(ref.digest)
        with storage_errors(path):
            return path.is_file() and path.stat().st_size == ref.size

    @contextmanager
    def local_path(self, ref: BlobRef) -> Iterator[Path]:
        """Yield a path of the blob that outlives the blob's own, if that is deleted meanwhile."""
        try:
            descriptor = os.open(self._path(ref.digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise self._lost(ref, "is missing") from error
        except OSError as error:
            raise storage_error(error, self._path(ref.digest)) from error
        try:
            size = os.fstat(descriptor).st_size
            if size != ref.size:
                raise self._lost(ref, f"has {size} bytes")
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    def delete(self, digest: str) -> None:
        """Remove the blob, if it exists; who has it open keeps it."""
        path = self._path(digest)
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def digests(self) -> set[str]:
        """Return the digests of all blobs there are."""
        with storage_errors(self._files):
            return {
                name
                for folder in os.scandir(self._files)
                if folder.is_dir()
                for name in os.listdir(folder)
                if DIGEST.fullmatch(name)
            }

    def _lost(self, ref: BlobRef, how: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"blob {ref.digest} ({ref.size} bytes) {how} in {self._files}; upload its adapter again"
        )

    def _path(self, digest: str) -> Path:
        return self._files / digest[:2] / digest


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` sure to outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
