"""Which kind of blob storage a URL means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from manylora_store.blobs.interface import Blobs
from manylora_store.blobs.local import LocalBlobs
from manylora_store.blobs.remote import RemoteBlobs
from manylora_store.errors import StoreError


def open_blobs(url: str, scratch: Callable[[], AbstractContextManager[Path]]) -> Blobs:
    """Open the blobs at ``url``: a path or ``file:`` URL, or any other URL that fsspec knows.

    ``scratch`` gives a private folder of this machine, for files on their way.

    Raises:
        StoreError: the URL or its driver is at fault, or the folder cannot be made.
    """
    try:
        # Other processes change what is there, so no listing may be remembered.
        file_system, root = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise StoreError(f"blobs cannot be at {_shown(url)}: {error}") from error
    if isinstance(file_system, LocalFileSystem):
        return LocalBlobs(Path(root))
    return RemoteBlobs(file_system, root, _shown(url), scratch)


def _shown(url: str) -> str:
    """Return ``url`` without a user and password."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
