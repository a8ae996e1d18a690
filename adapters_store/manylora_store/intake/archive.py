"""Archives: .zip, .tar and .tar.gz, told apart by their content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from manylora_store.checkpoint.zip_directory import ZIP_MAGIC
from manylora_store.errors import AdapterInvalidError, TooLargeError
from manylora_store.intake.inflate import CHUNK, GZIP, inflate
from manylora_store.intake.limits import Limits
from manylora_store.intake.members import Members
from manylora_store.intake.staging import Staging
from manylora_store.intake.tars import BLOCK, looks_like_tar, unpack_tar
from manylora_store.intake.zips import unpack_zip
from manylora_store.storage_failures import storage_errors

_GZIP_MAGIC = b"\x1f\x8b"
_TAR_HEADERS = 8 * 2**20


def unpack(archive: Path, staging: Staging, limits: Limits | None = None) -> None:
    """Stream the adapter's files in ``archive`` into ``staging``; nothing else is written.

    ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin`` must be at the top or in
    one folder. Other files are named in ``staging.ignored``. Paths are used to tell members apart,
    never to write.

    Raises:
        AdapterInvalidError: not such an archive, corrupt, truncated, a bomb, with links, devices,
            paths that lead out of it, members given twice, several adapters or none.
        TooLargeError: what it holds is larger than ``staging`` takes.
        StoreFullError: no room on the disk.
    """
    limits = limits or Limits()
    members = Members(limits)
    with storage_errors("the archive"), archive.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(BLOCK)
        file.seek(0)
        if beginning.startswith(ZIP_MAGIC):
            unpack_zip(archive, staging, members, limits)
        elif beginning.startswith(_GZIP_MAGIC):
            data = inflate(file.read, GZIP, limits, "archive")
            unpack_tar(_bounded(data, staging), size, staging, members, limits)
        elif looks_like_tar(beginning):
            data = iter(lambda: file.read(CHUNK), b"")
            unpack_tar(data, size, staging, members, limits)
        else:
            raise AdapterInvalidError(
                f"archive: its {size} bytes are none of .zip, .tar.gz and .tar"
            )
    members.finish()
    for name in members.ignored:
        staging.ignore(name)


def _bounded(data: Iterator[bytes], staging: Staging) -> Iterator[bytes]:
    """Bound what is read to find the members, beside what is written of them."""
    total = 0
    for piece in data:
        total += len(piece)
        if total > staging.max_bytes + _TAR_HEADERS:
            raise TooLargeError(
                f"archive: it unpacks to over {staging.max_bytes} bytes, which is the limit",
                staging.max_bytes,
            )
        yield piece
