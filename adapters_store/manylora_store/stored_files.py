"""The files of a stored revision, on this machine and opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from manylora_store.blobs.interface import Blobs
from manylora_store.checkpoint.folder import AdapterFiles, open_stored
from manylora_store.errors import (
    AdapterInvalidError,
    StoreUnavailableError,
    UnknownRevisionError,
)
from manylora_store.records import RevisionFiles
from manylora_store.registry import queries
from manylora_store.registry.database import Database


@contextmanager
def stored_files(database: Database, blobs: Blobs, digest: str) -> Iterator[AdapterFiles]:
    """Yield the files of revision ``digest``, which stay readable for as long as the block runs.

    Raises:
        UnknownRevisionError: it is not stored.
        StoreUnavailableError: its files are missing or corrupt.
    """
    with ExitStack() as stack:
        files = _look_up(database, digest)
        try:
            config, weights = _paths(files, blobs, stack)
        except StoreUnavailableError:
            # Removed after the look, and perhaps stored anew; if not, this one fails, too.
            files = _look_up(database, digest)
            config, weights = _paths(files, blobs, stack)
        try:
            opened = open_stored(config, weights, name=digest, source="", digest=digest)
        except AdapterInvalidError as error:
            raise StoreUnavailableError(
                f"a file of revision {digest} is corrupt ({error.message}): blob"
                f" {files.config.digest} or {files.weights.digest}; upload the adapter again"
            ) from error
        yield opened


def _paths(files: RevisionFiles, blobs: Blobs, stack: ExitStack) -> tuple[Path, Path]:
    return (
        stack.enter_context(blobs.local_path(files.config)),
        stack.enter_context(blobs.local_path(files.weights)),
    )


def _look_up(database: Database, digest: str) -> RevisionFiles:
    with database.read() as connection:
        files = queries.files(connection, digest)
    if files is None:
        raise UnknownRevisionError(f"no revision with digest {digest[:64]!r} is stored")
    return files
