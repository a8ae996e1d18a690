"""Opens a zip file without believing what it says of its own size."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora_store.errors import AdapterInvalidError

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""How a zip file begins: with a member, or, if it has none, with the end of its directory."""

ZIP_FAULTS = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    OSError,
    OverflowError,
    ValueError,
    struct.error,
)
"""What Python's zipfile raises for a broken directory."""


@contextmanager
def open_zip(path: Path, max_directory_bytes: int) -> Iterator[zipfile.ZipFile]:
    """Open the zip file ``path``, whose directory may take ``max_directory_bytes``.

    Python reads the directory whole and makes an object of every entry, however many.

    Raises:
        AdapterInvalidError: not a zip file, a broken one, or with too large a directory.
    """
    with _Limited(path, max_directory_bytes) as file:
        try:
            archive = zipfile.ZipFile(file)
        except ZIP_FAULTS as error:
            raise AdapterInvalidError(f"{path.name} is not a sound zip file: {error}") from error
        with archive:
            yield archive


class _Limited(io.FileIO):
    """A file of which one call reads at most ``limit`` bytes."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path)
        self._path = path
        self._limit = limit

    def read(self, size: int | None = -1, /) -> bytes:
        most = self._limit + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) > self._limit:
            raise AdapterInvalidError(
                f"{self._path.name}: the directory of the zip file takes over {self._limit} bytes"
            )
        return data
