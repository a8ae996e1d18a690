"""One change at a time to a name, on one event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.core.errors import AdapterConflictError


class NameLocks:
    """A lock for each name that somebody is changing, and none for the others."""

    def __init__(self, catalog: AdapterCatalog) -> None:
        self._catalog = catalog
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def lock(self, name: str) -> asyncio.Lock:
        """Return the lock of ``name``."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of ``name``; ``AdapterConflictError`` where it is being removed."""
        async with self.lock(name):
            if self._catalog.removing(name):
                raise AdapterConflictError(
                    f"name: adapter {name!r} is being removed; try again once it is gone.",
                    param="name",
                )
            yield
