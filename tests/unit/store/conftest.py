"""Stores on both kinds of registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from manylora_store.store import AdapterStore
from support.postgres import postgres_server


class OpenStore(Protocol):
    def __call__(self, home: Path | None = None, **options: Any) -> AdapterStore: ...


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Return a function that returns the URL of a PostgreSQL registry that does not exist yet."""
    with postgres_server() as new_place:
        yield new_place


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a registry that does not exist yet, on SQLite and on PostgreSQL."""
    if request.param == "postgresql":
        new_place = request.getfixturevalue("new_postgres")
        return str(new_place())
    return f"sqlite:///{tmp_path}/registry.sqlite3"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def open_store(home: Path, registry_url: str) -> Iterator[OpenStore]:
    """Return a function that opens a store, by default in ``home``; all are closed at the end."""
    with ExitStack() as stack:

        def open_one(folder: Path | None = None, **options: Any) -> AdapterStore:
            options = {"registry_url": registry_url, **options}
            return stack.enter_context(closing(AdapterStore(folder or home, **options)))

        yield open_one


@pytest.fixture
def store(open_store: OpenStore) -> AdapterStore:
    return open_store()
