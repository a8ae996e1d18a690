"""What the store asks of the place its files are in."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from manylora_store.records import BlobRef
from manylora_store.storage_failures import storage_errors

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class IncomingFile:
    """A file on its way to becoming the blob ``ref``."""

    path: Path
    ref: BlobRef

    @classmethod
    def measure(cls, path: Path) -> IncomingFile:
        """Read ``path`` once for its size and digest.

        Raises:
            StoreUnavailableError: it cannot be read.
        """
        with storage_errors(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(path, BlobRef(digest, file.tell()))


class Blobs(Protocol):
    """Content-addressed files at ``sha256/<first 2 digits>/<digest>`` under some root.

    Who calls ``put`` or ``delete`` holds the registry's writers' lock, so that no blob goes away
    between being put and being referred to. Everything raises ``StoreFullError`` where there is no
    room, and ``StoreUnavailableError`` where the storage fails otherwise.
    """

    def staging_root(self, preferred: Path) -> Path:
        """Return where uploads are best received: ``preferred``, if ``put`` is a rename there."""

    def prepare(self, file: IncomingFile) -> bool:
        """Do the slow part of ``put``, without the lock; return whether the blob exists by now."""

    def put(self, file: IncomingFile) -> None:
        """Make the blob exist, durably, in one step; ``file`` may be gone from its path then."""

    def holds(self, ref: BlobRef) -> bool:
        """Return whether the blob exists with its size."""

    def local_path(self, ref: BlobRef) -> AbstractContextManager[Path]:
        """Yield a path at which the blob can be read within the block, even if it is deleted.

        Raises:
            StoreUnavailableError: the blob is missing or not what its digest says.
        """

    def delete(self, digest: str) -> None:
        """Remove the blob, if it exists."""

    def digests(self) -> set[str]:
        """Return the digests of all blobs there are."""
