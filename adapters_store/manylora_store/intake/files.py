"""Files being written to the store's disk, and what can go wrong with that."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from manylora_store.storage_failures import storage_errors


class Sink:
    """A new file that takes bytes. Thread-safe; closing it twice does no harm.

    ``charge`` is told the size of every piece before it is written, and may refuse it. Without a
    ``path`` the bytes are counted and dropped. Nothing is synced to the disk here.
    """

    def __init__(self, name: str, path: Path | None, charge: Callable[[int], None]) -> None:
        """Raises ``StoreFullError`` or ``StoreUnavailableError`` if there can be no such file."""
        self._name = name
        self._charge = charge
        self._lock = threading.Lock()
        self._closed = False
        self._descriptor: int | None = None
        if path is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with storage_errors(name):
                self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Append all of ``data`` and return its size.

        Raises:
            TooLargeError: over the limit; further writes fail in the same way.
            StoreFullError: the disk, a quota or the largest file size has no room.
            StoreUnavailableError: the file cannot be written for another reason, or is closed.
        """
        view = memoryview(data).cast("B")
        self._charge(len(view))
        with self._lock, storage_errors(self._name):
            if self._closed:
                raise OSError(errno.EBADF, "the upload has ended already")
            done = 0
            while self._descriptor is not None and done < len(view):
                done += os.write(self._descriptor, view[done:])
        return len(view)

    def close(self) -> None:
        """End the file. Raises as ``write`` does."""
        with self._lock:
            self._closed = True
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                with storage_errors(self._name):
                    os.close(descriptor)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
