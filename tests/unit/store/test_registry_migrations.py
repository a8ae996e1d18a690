"""How a registry comes to its tables, and stays away from what is not its own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from manylora_store.errors import StoreError, StoreUnavailableError
from manylora_store.registry.database import Database
from manylora_store.registry.migrations import MIGRATIONS, Migration, migrate
from manylora_store.registry.schema import metadata, schema_versions
from unit.store.conftest import OpenStore
from unit.store.small_adapters import blobs_in, publish
from unit.store.store_process import command, environment

NEXT = Migration(
    len(MIGRATIONS) + 1,
    "licences",
    ("ALTER TABLE adapters ADD COLUMN licence VARCHAR(100) {bytewise}",),
)
BROKEN = Migration(
    len(MIGRATIONS) + 1,
    "broken",
    ("CREATE TABLE half (done INTEGER)", "INSERT INTO nowhere VALUES (1)"),
)


@pytest.fixture
def database(registry_url: str) -> Iterator[Database]:
    with closing(Database(registry_url, 10.0)) as database:
        yield database


def tables(database: Database) -> set[str]:
    with database.read() as connection:
        return set(sa.inspect(connection).get_table_names())


def versions(database: Database) -> list[tuple[int, str, float]]:
    with database.read() as connection:
        statement = sa.select(schema_versions).order_by(schema_versions.c.version)
        return [tuple(row) for row in connection.execute(statement)]


def test_the_migrations_are_in_order() -> None:
    assert [step.version for step in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_a_new_registry_has_the_tables_that_statements_are_written_against(
    database: Database,
) -> None:
    migrate(database)
    with database.read() as connection:
        inspector = sa.inspect(connection)
        assert set(inspector.get_table_names()) == set(metadata.tables)
        for table in metadata.tables.values():
            found = {column["name"]: column for column in inspector.get_columns(table.name)}
            assert list(found) == [column.name for column in table.columns]
            for column in table.columns:
                type_ = found[column.name]["type"]
                assert type_.python_type is column.type.python_type, column
                assert getattr(type_, "length", None) == getattr(column.type, "length", None)
                assert found[column.name]["nullable"] == column.nullable, column
            assert inspector.get_pk_constraint(table.name)["constrained_columns"] == [
                column.name for column in table.primary_key
            ]
            assert {
                (index["name"], *index["column_names"])
                for index in inspector.get_indexes(table.name)
            } == {(index.name, *index.columns.keys()) for index in table.indexes}
            assert {
                (*key["constrained_columns"], key["referred_table"], *key["referred_columns"])
                for key in inspector.get_foreign_keys(table.name)
            } == {
                (key.parent.name, key.column.table.name, key.column.name)
                for key in table.foreign_keys
            }


def test_migrating_again_changes_nothing(database: Database) -> None:
    migrate(database)
    before = versions(database)
    migrate(database)
    assert versions(database) == before
    assert [(version, name) for version, name, _ in before] == [
        (step.version, step.name) for step in MIGRATIONS
    ]


def test_an_old_registry_is_migrated_with_what_is_in_it(
    open_store: OpenStore, database: Database
) -> None:
    store = open_store()
    record = publish(store, "a", 1).record
    migrate(database, (*MIGRATIONS, NEXT))
    assert [version for version, _, _ in versions(database)][-1] == NEXT.version
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT name, licence FROM adapters").all() == [
            ("a", None)
        ]
    assert store.get("a") == record


def test_a_step_that_fails_leaves_the_registry_as_it_was(database: Database) -> None:
    migrate(database)
    before = tables(database), versions(database)
    with pytest.raises(StoreUnavailableError, match="nowhere") as caught:
        migrate(database, (*MIGRATIONS, BROKEN))
    assert isinstance(caught.value.__cause__, sa.exc.DBAPIError)
    assert (tables(database), versions(database)) == before
    migrate(database, (*MIGRATIONS, NEXT))


def test_a_first_step_that_fails_leaves_no_registry(database: Database) -> None:
    with pytest.raises(StoreUnavailableError):
        migrate(database, (*MIGRATIONS, BROKEN))
    assert tables(database) == set()


def test_a_registry_of_a_newer_version_is_refused(
    open_store: OpenStore, database: Database
) -> None:
    publish(open_store(), "a", 1)
    migrate(database, (*MIGRATIONS, NEXT))
    with pytest.raises(
        StoreError, match=rf"has schema version {NEXT.version}, .* knows versions up to"
    ):
        open_store()
    assert versions(database)[-1][0] == NEXT.version


def test_processes_that_start_at_once_share_one_registry(
    registry_url: str, home: Path, database: Database, open_store: OpenStore
) -> None:
    processes = [
        subprocess.Popen(
            command("open_and_publish", home, registry_url, f"name-{seed}", seed),
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        for seed in range(4)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert len(versions(database)) == len(MIGRATIONS)
    store = open_store()
    assert [name for name, _, _ in store.names()] == ["name-0", "name-1", "name-2", "name-3"]
    # One configuration file, which all share, and the weights of each.
    assert len(blobs_in(home)) == 5


def test_whoever_comes_second_finds_nothing_to_do(
    registry_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = database.write

    def be_late() -> AbstractContextManager[sa.Connection]:
        with closing(Database(registry_url, 10.0)) as first:
            migrate(first)
        return write()

    monkeypatch.setattr(database, "write", be_late)
    migrate(database)
    assert len(versions(database)) == len(MIGRATIONS)


def test_a_new_registry_beside_files_of_another_is_refused(
    open_store: OpenStore, home: Path, tmp_path: Path
) -> None:
    publish(open_store(), "a", 1)
    blobs = blobs_in(home)
    other = f"sqlite:///{tmp_path}/mistaken.sqlite3"
    for _ in range(2):
        with pytest.raises(StoreError, match=r"mistaken\.sqlite3 is new: name the registry"):
            open_store(registry_url=other)
    assert blobs_in(home) == blobs
    assert open_store().count() == 1
