"""What a database driver raises, as the store's errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from manylora_store.errors import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

# SQLite's extended result codes carry the primary code in their low byte.
_SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
# A write over a quota or a file size limit is an I/O error to SQLite, which keeps no errno.
_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}
# https://www.postgresql.org/docs/current/errcodes-appendix.html: lock not available, query
# cancelled (by a timeout), serialization failure, deadlock; disk full, out of memory for it.
_SQLSTATE_BUSY = {"55P03", "57014", "40001", "40P01"}
_SQLSTATE_FULL = {"53100"}


@contextmanager
def database_errors(where: str) -> Iterator[None]:
    """Raise what SQLAlchemy raises within the block about the registry at ``where`` as StoreError.

    Raises:
        StoreBusyError: another writer held it for longer than the busy timeout.
        StoreFullError: it could not grow.
        StoreUnavailableError: anything else.
    """
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise _busy(where) from error
    except sa.exc.DBAPIError as error:
        raise _of_driver(error.orig, where) from error
    except sa.exc.SQLAlchemyError as error:
        raise StoreUnavailableError(f"the registry at {where} failed: {error}") from error


def _of_driver(cause: BaseException | None, where: str) -> StoreError:
    sqlite_code = getattr(cause, "sqlite_errorcode", None)
    sqlstate = getattr(cause, "sqlstate", None)
    primary = None if sqlite_code is None else sqlite_code & 0xFF
    if primary in _SQLITE_BUSY or sqlstate in _SQLSTATE_BUSY:
        return _busy(where)
    if {sqlite_code, primary} & _SQLITE_FULL or sqlstate in _SQLSTATE_FULL:
        return StoreFullError(
            f"the registry at {where} cannot be written: its disk, quota or file size limit is"
            " full; make room there and try again"
        )
    return StoreUnavailableError(f"the registry at {where} failed: {cause}")


def _busy(where: str) -> StoreBusyError:
    return StoreBusyError(
        f"the registry at {where} is held by another writer for too long; try again"
    )
