"""Connections and transactions: order among writers, what readers see, and what fails how."""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from manylora_store.errors import (
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from manylora_store.registry.database import Database
from unit.store.store_process import running


@pytest.fixture
def database(registry_url: str) -> Iterator[Database]:
    with closing(Database(registry_url, 10.0)) as database:
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE counter (value INTEGER NOT NULL)")
            connection.exec_driver_sql("INSERT INTO counter VALUES (0)")
        yield database


def value(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SELECT value FROM counter").scalar_one())


def write(connection: sa.Connection, number: int) -> None:
    connection.exec_driver_sql(f"UPDATE counter SET value = {number}")


def test_sqlite_is_set_up_to_lose_nothing(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path}/r.sqlite3", 10.0)) as database:
        for connect in (database.read, database.snapshot, database.write):
            with connect() as connection:
                settings = {
                    name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                    for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
                }
                assert settings == {
                    "journal_mode": "wal",
                    "synchronous": 2,
                    "foreign_keys": 1,
                    "busy_timeout": 10_000,
                }


def test_writers_in_threads_and_connections_never_overlap(
    database: Database, registry_url: str
) -> None:
    with closing(Database(registry_url, 10.0)) as other:

        def count_up(which: Database) -> None:
            for _ in range(25):
                with which.write() as connection:
                    write(connection, value(connection) + 1)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(count_up, [database, other, database, other]))
    with database.read() as connection:
        assert value(connection) == 100


def test_what_fails_is_undone(database: Database) -> None:
    def fail_after_writing() -> None:
        with database.write() as connection:
            write(connection, 7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_writing()
    with database.read() as connection:
        assert value(connection) == 0


def test_readers_neither_wait_for_a_writer_nor_see_what_it_has_not_committed(
    database: Database,
) -> None:
    with database.write() as writer:
        write(writer, 1)
        with database.read() as reader:
            assert value(reader) == 0
    with database.read() as reader:
        assert value(reader) == 1


def test_every_statement_of_a_reader_sees_the_latest_commit(database: Database) -> None:
    with database.read() as reader:
        for number in (1, 2):
            with database.write() as writer:
                write(writer, number)
            assert value(reader) == number


def test_a_snapshot_stays_what_it_was(database: Database) -> None:
    with database.snapshot() as snapshot:
        assert value(snapshot) == 0
        with database.write() as writer:
            write(writer, 1)
        assert value(snapshot) == 0
    with database.snapshot() as snapshot:
        assert value(snapshot) == 1


def test_a_registry_held_by_another_process_is_busy(
    database: Database, registry_url: str, home: Path
) -> None:
    with (
        running("hold_the_writers_lock", home, registry_url) as line,
        closing(Database(registry_url, 0.2)) as impatient,
    ):
        assert line == "held"
        with pytest.raises(StoreBusyError, match="try again"), impatient.write():
            pytest.fail("the other process holds it")
        with impatient.read() as connection:
            assert value(connection) == 0
    with database.write() as connection:
        write(connection, 1)


def test_a_registry_held_by_another_thread_is_busy(registry_url: str, database: Database) -> None:
    with closing(Database(registry_url, 0.2)) as impatient:
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with impatient.write():
                held.set()
                done.wait(60)

        with ThreadPoolExecutor(1) as thread:
            holding = thread.submit(hold)
            assert held.wait(60)
            with pytest.raises(StoreBusyError), impatient.write():
                pytest.fail("the other thread holds it")
            done.set()
            holding.result()
        with impatient.write() as connection:
            write(connection, 1)


def test_the_switch_to_a_log_waits_for_whoever_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusyError, match=r"r\.sqlite3"):
            Database(f"sqlite:///{path}", 0.1)
        with ThreadPoolExecutor(1) as thread:
            opening = thread.submit(Database, f"sqlite:///{path}", 60.0)
            with pytest.raises(TimeoutError):
                opening.result(0.2)
            holder.execute("ROLLBACK")
            opening.result().close()


def test_a_full_disk_is_full(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/r.sqlite3"
    with closing(Database(url, 10.0)) as database:
        with database.write() as connection:
            connection.exec_driver_sql("CREATE TABLE text (content TEXT)")
            # SQLite answers as it does for a full disk.
            connection.exec_driver_sql("PRAGMA max_page_count = 10")
        with (
            pytest.raises(
                StoreFullError, match=r"r\.sqlite3 cannot be written.* make room"
            ) as caught,
            database.write() as connection,
        ):
            connection.execute(sa.text("INSERT INTO text VALUES (:x)"), {"x": "x" * 100_000})
        assert isinstance(caught.value.__cause__, sa.exc.OperationalError)
        with database.write() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM text").scalar() == 0


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("55P03", StoreBusyError),
        ("57014", StoreBusyError),
        ("40P01", StoreBusyError),
        ("53100", StoreFullError),
        ("58030", StoreUnavailableError),
    ],
)
def test_postgres_says_by_a_code_what_failed(
    new_postgres: Callable[[], str], state: str, expected: type[StoreError]
) -> None:
    with (
        closing(Database(new_postgres(), 10.0)) as database,
        pytest.raises(expected) as caught,
        database.write() as connection,
    ):
        connection.exec_driver_sql(
            f"DO $$ BEGIN RAISE EXCEPTION 'nothing to go by' USING ERRCODE = '{state}'; END $$"
        )
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, sa.exc.DBAPIError)


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite3"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnavailableError, match=r"r\.sqlite3 failed") as caught:
        Database(f"sqlite:///{path}", 0.2)
    cause = caught.value.__cause__
    assert isinstance(cause, sa.exc.DatabaseError)
    assert isinstance(cause.orig, sqlite3.DatabaseError)
    assert path.read_bytes() == b"no database" * 1000


def test_a_folder_that_does_not_exist_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match=r"no/r\.sqlite3"):
        Database(f"sqlite:///{tmp_path}/no/r.sqlite3", 0.2)


def test_a_file_system_without_shared_memory_is_refused(tmp_path: Path) -> None:
    # This way of locking files cannot do write-ahead logging, as network file systems cannot.
    url = f"sqlite:///file:{tmp_path}/r.sqlite3?vfs=unix-dotfile&uri=true"
    with pytest.raises(StoreUnavailableError, match="cannot do write-ahead logging"):
        Database(url, 0.2)


@pytest.mark.parametrize(
    "url",
    [
        "nonsense with secret",
        "",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://root:secret@localhost/x",
        "postgresql://root:secret@localhost:port/x",
        "oracle://root:secret@localhost/x",
    ],
)
def test_a_url_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError, match="is expected") as caught:
        Database(url, 0.2)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_urls_are_taken_as_they_come(new_postgres: Callable[[], str], scheme: str) -> None:
    url = new_postgres().replace("postgresql://", f"{scheme}://")
    with closing(Database(url, 10.0)) as database, database.read() as connection:
        assert connection.dialect.driver == "psycopg"
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_postgres_out_of_reach_is_unavailable(tmp_path: Path) -> None:
    with closing(Database(f"postgresql://me:secret@/x?host={tmp_path}", 0.2)) as database:
        for connect in (database.read, database.snapshot, database.write):
            with pytest.raises(StoreUnavailableError) as caught, connect():
                pytest.fail("there is no server")
            assert "secret" not in caught.value.message
            assert isinstance(caught.value.__cause__, sa.exc.OperationalError)


def test_postgres_without_its_driver_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"install manylora\[postgres\]"):
        Database("postgresql://me@host/x", 0.2)


def test_connections_that_postgres_closed_are_replaced(new_postgres: Callable[[], str]) -> None:
    url = new_postgres()
    with closing(Database(url, 10.0)) as database:
        with database.read() as one, database.write() as two:
            ids = [
                connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
                for connection in (one, two)
            ]
        with psycopg.connect(url, autocommit=True) as administrator:
            for number in ids:
                administrator.execute("SELECT pg_terminate_backend(%s)", [number])
        with database.read() as one, database.write() as two:
            for connection in (one, two):
                assert connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() not in ids
