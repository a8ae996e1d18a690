"""Blobs in whatever fsspec reaches: object storage, another machine, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fsspec import AbstractFileSystem

from manylora_store.blobs.interface import DIGEST, IncomingFile
from manylora_store.errors import StoreUnavailableError
from manylora_store.records import BlobRef
from manylora_store.storage_failures import storage_error


class RemoteBlobs:
    """``Blobs`` under an fsspec URL. ``scratch()`` is a private folder of this machine for a while.

    An upload that was cut off leaves an object of another size, if any: it is not taken for the
    blob, no revision refers to it, and the next sweep removes it. What is read is checked whole.
    """

    def __init__(
        self,
        file_system: AbstractFileSystem,
        root: str,
        url: str,
        scratch: Callable[[], AbstractContextManager[Path]],
    ) -> None:
        """Use the folder ``root`` of ``file_system``; ``url`` is what messages call it."""
        self._fs = file_system
        self._files = f"{root.rstrip('/')}/sha256"
        self._url = url
        self._scratch = scratch

    def staging_root(self, preferred: Path) -> Path:
        """Return ``preferred``: files are copied from wherever they are."""
        return preferred

    def prepare(self, file: IncomingFile) -> bool:
        """Upload the file, unless the blob is there."""
        self.put(file)
        return True

    def put(self, file: IncomingFile) -> None:
        """Upload the file, unless the blob is there, as it is if ``prepare`` was just called.

        It is not if another process swept in between.
        """
        if self.holds(file.ref):
            return
        path = self._path(file.ref.digest)
        with self._errors(file.ref.digest):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file.path), path)

    def holds(self, ref: BlobRef) -> bool:
        """Return whether the blob exists with its size."""
        with self._errors(ref.digest):
            try:
                return bool(self._fs.info(self._path(ref.digest))["size"] == ref.size)
            except FileNotFoundError:
                return False

    @contextmanager
    def local_path(self, ref: BlobRef) -> Iterator[Path]:
        """Download the blob, check it, and yield where it is until the block ends."""
        with self._scratch() as folder:
            path = folder / ref.digest
            with self._errors(ref.digest):
                self._fs.get_file(self._path(ref.digest), str(path))
            found = IncomingFile.measure(path).ref
            if found != ref:
                raise StoreUnavailableError(
                    f"blob {ref.digest} at {self._url} is corrupt: {found.size} bytes with SHA-256"
                    f" {found.digest} came, {ref.size} bytes were expected; upload its adapter"
                    " again"
                )
            yield path

    def delete(self, digest: str) -> None:
        """Remove the blob, if it exists."""
        with self._errors(digest):
            try:
                self._fs.rm_file(self._path(digest))
            except FileNotFoundError:
                return

    def digests(self) -> set[str]:
        """Return the digests of all blobs there are."""
        with self._errors("sha256"):
            try:
                paths = self._fs.find(self._files)
            except FileNotFoundError:
                return set()
        names = (path.rpartition("/")[2] for path in paths)
        return {name for name in names if DIGEST.fullmatch(name)}

    def _path(self, digest: str) -> str:
        return f"{self._files}/{digest[:2]}/{digest}"

    @contextmanager
    def _errors(self, subject: str) -> Iterator[None]:
        where = f"{subject} at {self._url}"
        try:
            yield
        except OSError as error:
            raise storage_error(error, where) from error
        except Exception as error:
            # Each driver raises its client library's own errors, which have no base in common.
            raise StoreUnavailableError(f"{where} cannot be used: {error!r}") from error
