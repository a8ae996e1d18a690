"""Connections and transactions, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa

from manylora_store.errors import StoreError, StoreUnavailableError
from manylora_store.registry.failures import database_errors

DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}
READERS = 4
"""Connections kept open for reading; more are opened while more threads read at once."""
MOST_READERS = 32
# Any number will do, as long as every process takes the same.
_WRITERS_LOCK = 0x6D616E796C6F7261


class Database:
    """One SQL database, opened by URL. Thread-safe; several processes may share it.

    Writers are serialised across all threads and processes, so what a write transaction has read
    is still so when it commits. Readers never wait for writers and see every commit at once.
    """

    def __init__(self, url: str | sa.URL, busy_timeout: float) -> None:
        """Use the database at ``url``; a writer waits ``busy_timeout`` seconds for its turn.

        Raises:
            StoreError: the URL or its driver is at fault.
            StoreUnavailableError: the database cannot be opened.
        """
        parsed = _parse(url)
        self.where = (
            str(parsed.database)
            if parsed.get_backend_name() == "sqlite"
            else parsed.render_as_string(hide_password=True)
        )
        self._busy_timeout = busy_timeout
        # One writing connection: a process's own writers wait for it in order, without polling.
        self._writer = self._engine(parsed, "READ COMMITTED", pool_size=1, max_overflow=0)
        self._reader = self._snapshots = self._engine(
            parsed, "AUTOCOMMIT", pool_size=READERS, max_overflow=MOST_READERS - READERS
        )
        if not self._is_sqlite:
            self._snapshots = self._reader.execution_options(isolation_level="REPEATABLE READ")
            return
        try:
            self._switch_to_wal()
        except BaseException:
            self.close()
            raise

    @property
    def _is_sqlite(self) -> bool:
        return self._writer.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection on which every statement sees the latest commits."""
        with database_errors(self.where), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """Yield a connection on which all statements see the same state."""
        with database_errors(self.where), self._snapshots.connect() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN")
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Yield the connection of a transaction that no other writer overlaps; commit at the end.

        Not to be nested: the inner one would wait for the outer.

        Raises:
            StoreBusyError: other writers did not give way within the busy timeout.
            StoreFullError: no room for the change, which is undone.
        """
        with database_errors(self.where), self._writer.connect() as connection:
            if self._is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                # A higher level of isolation would see things as they were before the wait.
                wait = sa.func.set_config("lock_timeout", f"{self._busy_timeout * 1e3:.0f}ms", True)
                connection.execute(sa.select(wait))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))
            yield connection
            connection.commit()

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._writer.dispose()
        self._reader.dispose()

    def _engine(self, url: sa.URL, isolation_level: str, **pool: int) -> sa.Engine:
        """Make a pool of connections; SQLite has but one level of isolation."""
        options: dict[str, Any] = {
            **pool,
            "pool_timeout": self._busy_timeout,
            "hide_parameters": True,
            "json_serializer": partial(json.dumps, allow_nan=False, separators=(",", ":")),
        }
        if url.get_backend_name() == "postgresql":
            options |= {
                "isolation_level": isolation_level,
                "pool_pre_ping": True,
                "connect_args": {"connect_timeout": max(2, round(self._busy_timeout))},
            }
        else:
            options["connect_args"] = {"timeout": self._busy_timeout}
        try:
            engine = sa.create_engine(url, **options)
        except ImportError as error:
            raise StoreError(
                f"the registry at {self.where} needs a driver that is not installed ({error.name});"
                " install manylora[postgres]"
            ) from error
        if url.get_backend_name() == "sqlite":
            sa.event.listen(engine, "connect", _prepare_sqlite)
        return engine

    def _switch_to_wal(self) -> None:
        """Make the database one whose readers and writer do not wait for each other.

        The switch needs the database for itself, and SQLite does not wait for that: processes that
        create it at the same time try again.
        """
        deadline = time.monotonic() + self._busy_timeout
        with database_errors(self.where), self._writer.connect() as connection:
            while True:
                try:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
                    break
                except sa.exc.OperationalError as error:
                    code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
                    if code & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise
                time.sleep(0.01)
        if mode != "wal":
            raise StoreUnavailableError(
                f"the registry at {self.where} stays in journal mode {mode!r}; its file system"
                " cannot do write-ahead logging: put it on a local disk, or use PostgreSQL"
            )


def _parse(url: str | sa.URL) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        # The text may hold a password, so it is not repeated.
        raise StoreError(
            "the registry's URL cannot be read; 'sqlite:////path/to/file' or"
            " 'postgresql://user:password@host/database' is expected"
        ) from error
    backend = "postgresql" if parsed.drivername == "postgres" else parsed.get_backend_name()
    if backend not in DRIVERS or (
        backend == "sqlite" and parsed.database in (None, "", ":memory:")
    ):
        raise StoreError(
            f"the registry cannot be at {parsed.render_as_string(hide_password=True)!r};"
            " 'sqlite:////path/to/file' or 'postgresql://user:password@host/database' is expected"
        )
    return parsed.set(drivername=DRIVERS[backend])


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # Transactions are begun by hand: the driver's own begin too late, and not IMMEDIATE.
    connection.isolation_level = None
    # A commit that was reported must outlive a power failure; in WAL mode NORMAL would not do.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
