"""Which adapters stay on the device whatever else is wanted there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.adapters.residency import Residency
from manylora_server.core.blocking import in_thread
from manylora_server.core.errors import AdapterConflictError
from manylora_server.core.store_errors import store_errors_translated
from manylora_store.records import AdapterRecord

ResultT = TypeVar("ResultT")


class EngineTasks(Protocol):
    """The engine's thread, as far as this layer needs it; see ``engine.AsyncEngine``."""

    def run(self, task: Callable[[], ResultT]) -> Future[ResultT]:
        """Run ``task`` between two steps."""


class Pins:
    """Keeps the store's pins and the engine's the same. Belongs on the event loop."""

    def __init__(self, catalog: AdapterCatalog, residency: Residency, engine: EngineTasks) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._residency = residency
        self._engine = engine
        self._lock = asyncio.Lock()

    async def set(self, name: str, pinned: bool) -> AdapterRecord:
        """Pin or unpin ``name``.

        ``AdapterConflictError`` if no slot would be left for others, or too few for a mix in use.
        """
        async with self._lock:
            if pinned:
                await self._check_room(name)
            with store_errors_translated(param="name"):
                record = await in_thread(self._store.set_pinned, name, pinned)
        await self.refresh()
        return record

    async def refresh(self) -> None:
        """Have the engine keep, and bring to the device, what is pinned now."""
        digests = await in_thread(self._catalog.pinned)
        await asyncio.wrap_future(self._engine.run(lambda: self._residency.pin(digests)))

    async def _check_room(self, name: str) -> None:
        with store_errors_translated():
            pinned = await in_thread(self._store.pinned)
        others = {digest for other, digest in pinned if other != name}
        slots = len(self._residency.slots)
        if len(others) + 1 >= slots:
            raise AdapterConflictError(
                f"name: {len(others)} adapters are pinned to the {slots} slots already, and one "
                "slot must stay for the others; unpin one, or start the server with more "
                "--adapter-slots.",
                param="name",
            )
        with store_errors_translated(param="name"):
            wanted = await in_thread(self._store.resolve, name)
        if self._catalog.most_at_once({*others, wanted.digest}) > slots:
            raise AdapterConflictError(
                f"name: a request that mixes adapters needs more of the {slots} slots than pinning "
                f"{name!r} would leave; try again once it has ended, or start the server with more "
                "--adapter-slots.",
                param="name",
            )
