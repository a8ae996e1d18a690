"""A store whose process is killed at every step of a change: ``... crash_runs SCENARIO HOME URL``.

The steps are the calls of the process that reach the system or the database, just before and just
after each; they are counted by the interpreter's profiling hook, so the store knows nothing of it.
For every step the change is begun in a child process, which kills itself there; then the store is
opened again and described. Printed as JSON: the state before, the state after, and for each
step where it was and what was found.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from manylora_store.registry.database import Database
from manylora_store.registry.schema import metadata
from manylora_store.store import AdapterStore
from unit.store.small_adapters import blobs_in, leftovers_in, publish

# Functions of the system and of sqlite3, by their qualified names.
SYSTEM_CALLS = {
    "open",
    "write",
    "fsync",
    "fchmod",
    "mkdir",
    "replace",
    "unlink",
    "rmdir",
    "flock",
    "Connection.execute",
    "Cursor.execute",
    "Connection.commit",
    "Connection.rollback",
    "Connection.close",
}
# Those that matter where the registry is not made of files, too.
FILE_CALLS = {"replace", "unlink"}
# Methods of psycopg, which are written in Python.
DRIVER_CALLS = {"Cursor.execute", "Connection.commit", "Connection.rollback", "Connection.close"}


@dataclass(frozen=True)
class Scenario:
    """``change`` on a store in which ``before`` was published: pairs of a name and a seed."""

    before: tuple[tuple[str, int], ...]
    change: Callable[[AdapterStore], object]


SCENARIOS = {
    "first-upload": Scenario((), lambda store: publish(store, "a", 1)),
    "new-revision": Scenario((("a", 1), ("b", 1)), lambda store: publish(store, "a", 2)),
    "other-bytes": Scenario((("a", 1),), lambda store: publish(store, "b", 1, padding=3)),
    "rollback": Scenario(
        (("a", 1), ("a", 2)),
        lambda store: store.rollback("a", store.get("a").revisions[1].digest),
    ),
    "removal": Scenario((("a", 1), ("a", 2), ("b", 1), ("c", 3)), lambda store: store.remove("a")),
    "last-removal": Scenario((("a", 1),), lambda store: store.remove("a")),
}


def opened(home: Path, url: str) -> closing[AdapterStore]:
    return closing(AdapterStore(home, registry_url=url))


def wipe(home: Path, url: str) -> None:
    """Make the store one that never was."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    with closing(Database(url, 10.0)) as database, database.write() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table.name}")


def describe(home: Path, url: str) -> Any:
    """Open the store and say what is in it: the registry, the files, and what else lies around."""
    with opened(home, url) as store:
        names = {
            record.name: [record.digest, [ref.digest for ref in record.revisions]]
            for record in store.list(limit=100)
        }
        for _, revisions in names.values():
            for digest in revisions:
                with store.files(digest) as files:
                    assert files.weights.header
    return [names, sorted(blobs_in(home)), leftovers_in(home)]


def die_at(step: int, system_calls: set[str]) -> None:
    """Kill this process at its ``step``-th step from here, after writing to stdout which it is."""
    count = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("c_call", "c_return"):
            name = argument.__qualname__
            watched = name in system_calls
        else:
            name = frame.f_code.co_qualname
            watched = name in DRIVER_CALLS and "psycopg" in frame.f_code.co_filename
        if not watched:
            return
        count += 1
        if count == step:
            sys.setprofile(None)
            os.write(1, f"{'before' if event.endswith('call') else 'after'} {name}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)


def run_killed(work: Callable[[Callable[[], None]], None], step: int, url: str) -> str | None:
    """Do ``work`` in a child that dies at ``step``; return where that was, None if it ended.

    ``work`` is given a function to call where the steps begin to count.
    """
    system_calls = SYSTEM_CALLS if url.startswith("sqlite") else FILE_CALLS
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        work(lambda: die_at(step, system_calls))
        sys.setprofile(None)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        where = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return where
    assert status == 0, f"the change failed by itself: {status}"
    return None


def run(scenario: Scenario, home: Path, url: str) -> dict[str, Any]:
    """Kill the scenario's change at each of its steps in turn."""

    def prepare() -> None:
        wipe(home, url)
        with opened(home, url) as store:
            for name, seed in scenario.before:
                publish(store, name, seed)

    def change(begin: Callable[[], None]) -> None:
        with opened(home, url) as store:
            begin()
            scenario.change(store)

    prepare()
    before = describe(home, url)
    change(lambda: None)
    after = describe(home, url)
    found = []
    while True:
        prepare()
        where = run_killed(change, len(found) + 1, url)
        if where is None:
            return {"before": before, "after": after, "found": found}
        found.append([where, describe(home, url)])


def run_creation(home: Path, url: str) -> dict[str, Any]:
    """Kill the process that creates the store, at each of its steps in turn."""

    def create(begin: Callable[[], None]) -> None:
        begin()
        AdapterStore(home, registry_url=url).close()

    wipe(home, url)
    empty = describe(home, url)
    found = []
    while True:
        wipe(home, url)
        where = run_killed(create, len(found) + 1, url)
        if where is None:
            return {"before": empty, "after": empty, "found": found}
        found.append([where, describe(home, url)])


if __name__ == "__main__":
    name, home, url = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    report = run_creation(home, url) if name == "creation" else run(SCENARIOS[name], home, url)
    print(json.dumps(report))
