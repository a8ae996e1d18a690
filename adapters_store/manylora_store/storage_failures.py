"""What a file system raises, as the store's errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora_store.errors import StoreError, StoreFullError, StoreUnavailableError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


@contextmanager
def storage_errors(where: Path | str) -> Iterator[None]:
    """Raise what the operating system raises within the block about ``where`` as StoreError.

    Raises:
        StoreFullError: no room on the disk, in the quota or under the file size limit.
        StoreUnavailableError: anything else.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from error


def storage_error(error: OSError, where: Path | str) -> StoreError:
    """Return the StoreError that says what ``error`` means for ``where``."""
    if error.errno in _FULL:
        return StoreFullError(
            f"{where} cannot be written: {_FULL[error.errno]}; make room there and try again"
        )
    return StoreUnavailableError(f"{where} cannot be used: {error.strerror or error!r}")
