"""What operators do with adapters while requests are served: add, replace, move, remove."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import psutil
import torch

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.adapters.host_tier import HostTier
from manylora_server.adapters.intake import Intake, MixMember, checked_name
from manylora_server.adapters.memory import give_memory_back
from manylora_server.adapters.name_locks import NameLocks
from manylora_server.adapters.pins import EngineTasks, Pins
from manylora_server.adapters.residency import Residency
from manylora_server.adapters.status import TIERS, AdapterStatus, Tier
from manylora_server.adapters.twins.job import MergeOrder
from manylora_server.adapters.twins.twins import Twins
from manylora_server.core.blocking import in_thread
from manylora_server.core.errors import (
    AdapterConflictError,
    AdapterInUseError,
    InvalidRequestError,
)
from manylora_server.core.observer import EngineObserver, EngineState
from manylora_server.core.staged import staged
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.core.types import Precision
from manylora_store.intake.staging import Staging
from manylora_store.records import AdapterRecord, Publication

ResultT = TypeVar("ResultT")

_PAGE = 200
_DRAIN_POLL_S = 0.02


class AdapterService:
    """Every method belongs on the event loop and leaves it free while it waits.

    Raises ``ManyloraError`` only, apart from what a ``Staging`` raises.
    """

    def __init__(
        self,
        catalog: AdapterCatalog,
        intake: Intake,
        residency: Residency,
        host: HostTier,
        twins: Twins,
        engine: EngineTasks,
        engine_state: Callable[[], EngineState],
        observer: EngineObserver,
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._intake = intake
        self._residency = residency
        self._host = host
        self._twins = twins
        self._engine = engine
        self._engine_state = engine_state
        self._observer = observer
        self._started = time.monotonic()
        self._names = NameLocks(catalog)
        self._pins = Pins(catalog, residency, engine)
        self._tasks: set[asyncio.Task[None]] = set()
        # Checks need tensors: one thread, with one OpenMP thread (decision 5).
        self._examiner = ThreadPoolExecutor(
            1, "manylora-intake", initializer=torch.set_num_threads, initargs=(1,)
        )
        catalog.on_unused = self._drop

    def close(self) -> None:
        """End the thread that examines adapters."""
        self._examiner.shutdown(wait=True, cancel_futures=True)

    def stage(self) -> Staging:
        """Return a new private folder for files on their way in."""
        return self._intake.stage()

    async def add(self, name: str, staging: Staging, source: str) -> AdapterStatus:
        """Check the files received in ``staging`` and publish them as ``name``.

        The same content again changes nothing; other content under a known name is a new revision,
        which requests that come later get.
        """
        checked_name(name)
        intake = self._intake
        files = await in_thread(intake.open, staging, name, source)
        async with self._names.changing(name):
            publication = await in_thread(intake.point, name, files)
        if publication is None:
            compiled, measured = await self._examine(lambda: intake.examine(files))
            for step in measured.steps:
                await asyncio.wrap_future(self._engine.run(partial(intake.measure, step)))
            async with self._names.changing(name):
                publication = await in_thread(intake.publish, name, files, compiled, measured)
        await self._moved(publication)
        return self._status(publication.record)

    async def add_source(self, name: str, source: str) -> AdapterStatus:
        """Fetch a folder of this machine or a hub repository, then ``add`` it."""
        checked_name(name)
        async with staged(self.stage) as staging:
            found = await in_thread(self._intake.fetch, source, staging)
            return await self.add(name, staging, found)

    async def add_mix(self, name: str, mix: Mapping[str, float]) -> AdapterStatus:
        """Sum registered adapters up as one of their own, then ``add`` it.

        ``mix`` is references (``name`` or ``name@digest``) with weights. The sum is exact and stays
        as it is when the members' names move on.
        """
        checked_name(name)
        choices = [await in_thread(self._catalog.resolve, reference) for reference in mix]
        members = [
            MixMember(choice.name, choice.digest, weight)
            for choice, weight in zip(choices, mix.values(), strict=True)
        ]
        with ExitStack() as leases:
            for choice in choices:
                self._catalog.lease(choice)
                leases.callback(self._catalog.release, choice)
            async with staged(self.stage) as staging:
                source = await self._examine(lambda: self._intake.mix(members, staging))
                return await self.add(name, staging, source)

    async def remove(self, name: str, *, drain: bool) -> None:
        """Forget ``name`` and its revisions; with ``drain``, once its requests have ended."""
        await self._record(name)
        async with self._names.changing(name):
            self._catalog.begin_removal(name, drain=drain)
        try:
            while self._catalog.in_use(name):
                await asyncio.sleep(_DRAIN_POLL_S)
        except BaseException:
            self._catalog.end_removal(name)
            raise
        # From here on it is carried through, whether or not anybody still waits for it.
        forgetting = asyncio.create_task(self._forget(name))
        self._tasks.add(forgetting)
        forgetting.add_done_callback(self._tasks.discard)
        await asyncio.shield(forgetting)

    async def load(self, name: str, *, pin: bool | None) -> AdapterStatus:
        """Bring the adapter to the device; ``pin`` also pins or unpins it, ``None`` does neither.

        ``OverloadedError`` where every slot is in use or pinned.
        """
        record = await self._record(name)
        self._catalog.check_base(name, record.base_fingerprint)
        if pin is not None and pin != record.pinned:
            record = await self._pins.set(name, pin)
        digest = record.digest
        loading = await asyncio.wrap_future(self._engine.run(lambda: self._residency.load(digest)))
        await asyncio.wrap_future(loading)
        return await self.describe(name)

    async def unload(self, name: str) -> AdapterStatus:
        """Free the adapter's device and host memory, and its twin's; it stays registered."""
        record = await self._record(name)
        if record.pinned:
            raise AdapterConflictError(
                f"name: adapter {name!r} is pinned to the device; unpin it first.", param="name"
            )
        count = self._catalog.in_use(name)
        dropped = False
        if not count:
            digest = record.digest
            dropped = await asyncio.wrap_future(self._engine.run(lambda: self._free(digest)))
        if not dropped:
            raise AdapterInUseError(
                f"name: {max(count, 1)} requests use adapter {name!r} now; try again later.",
                param="name",
            )
        gone = await asyncio.wrap_future(self._engine.run(self._twins.freed))
        await asyncio.wrap_future(gone)
        await in_thread(give_memory_back)
        return await self.describe(name)

    async def set_pinned(self, name: str, pinned: bool) -> AdapterStatus:
        """Keep the adapter on the device from now on, or let it go when its slot is needed."""
        record = await self._record(name)
        if pinned:
            self._catalog.check_base(name, record.base_fingerprint)
        await self._pins.set(name, pinned)
        return await self.describe(name)

    async def merge(self, name: str, precision: Precision, *, force: bool) -> AdapterStatus:
        """Fold the name's current revision into a copy of the base's weights, a *twin*.

        Returns once steps may use it; requests go on meanwhile. Goes on even if nobody waits.
        """
        record = await self._record(name)
        self._catalog.check_base(name, record.base_fingerprint)
        order = MergeOrder(record.digest, precision, force)
        merging = await asyncio.wrap_future(self._engine.run(lambda: self._twins.merge(order)))
        await asyncio.shield(asyncio.wrap_future(merging))
        await in_thread(give_memory_back)
        return await self.describe(name)

    async def unmerge(self, name: str) -> AdapterStatus:
        """Drop the twin of the name's current revision, or stop making one; else do nothing."""
        record = await self._record(name)
        digest = record.digest

        def drop() -> Future[None]:
            self._twins.drop(digest)
            return self._twins.freed()

        await asyncio.wrap_future(await asyncio.wrap_future(self._engine.run(drop)))
        await in_thread(give_memory_back)
        return await self.describe(name)

    async def rollback(self, name: str, digest: str) -> AdapterStatus:
        """Point ``name`` at an earlier revision of its history."""
        async with self._names.changing(name):
            with store_errors_translated(param="digest"):
                found = await in_thread(self._store.resolve, name, digest)
            self._catalog.check_base(name, found.base_fingerprint)
            with store_errors_translated(param="digest"):
                publication = await in_thread(self._store.rollback, name, found.digest)
        await self._moved(publication)
        return self._status(publication.record)

    async def describe(self, name: str) -> AdapterStatus:
        """Return what is known of ``name``."""
        return self._status(await self._record(name))

    async def list(
        self, *, limit: int, after: str | None, residency: str | None
    ) -> tuple[list[AdapterStatus], bool]:
        """Return the first ``limit`` adapters behind ``after`` by name, and whether more follow."""
        if residency is not None and residency not in TIERS:
            raise InvalidRequestError(
                f"residency: {residency!r} came; it is one of {', '.join(TIERS)}.",
                param="residency",
            )
        found: list[AdapterStatus] = []
        while len(found) <= limit:
            size = limit + 1 if residency is None else _PAGE
            with store_errors_translated(param="after"):
                page = await in_thread(self._store.list, limit=size, after=after)
            statuses = (self._status(record) for record in page)
            found += (s for s in statuses if residency in (None, s.residency))
            if len(page) < size:
                break
            after = page[-1].name
        return found[:limit], len(found) > limit

    async def stats(self) -> dict[str, Any]:
        """Return how many adapters are where, and how much room there is."""
        return {
            "adapters": {
                "registered": await self._count(),
                "host": len(self._host),
                "host_bytes": self._host.bytes,
                "host_bytes_limit": self._host.max_bytes,
                "device": len(self._residency.on_device),
                "slots": len(self._residency.slots),
                "pinned": len(self._residency.pinned),
            },
            "merging": self._twins.stats(),
            "engine": asdict(self._engine_state()),
            "process": {
                "rss_bytes": psutil.Process().memory_info().rss,
                "uptime_s": round(time.monotonic() - self._started, 3),
            },
        }

    async def _count(self) -> int:
        """Return how many names are registered, and tell the observer."""
        with store_errors_translated():
            count = await in_thread(self._store.count)
        self._observer.on_registered(count)
        return count

    async def _examine(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._examiner, work)

    async def _record(self, name: str) -> AdapterRecord:
        with store_errors_translated(param="name"):
            return await in_thread(self._store.get, name)

    def _status(self, record: AdapterRecord) -> AdapterStatus:
        tier: Tier = "disk"
        if record.digest in self._residency.on_device:
            tier = "device"
        elif record.digest in self._host:
            tier = "host"
        twin = self._twins.records.get(record.digest)
        return AdapterStatus(record, tier, self._catalog.in_use(record.name), twin)

    async def _forget(self, name: str) -> None:
        """Remove a name that is not in use, and what it alone kept in memory."""
        try:
            async with self._names.lock(name):
                with store_errors_translated(param="name"):
                    removed = await in_thread(self._store.remove, name)
        finally:
            self._catalog.end_removal(name)
        await self._count()
        await self._pins.refresh()
        for digest in removed:
            self._catalog.retire(digest)
        await in_thread(give_memory_back)

    async def _moved(self, publication: Publication) -> None:
        """Let the revision that a name has left go, once nobody uses it."""
        record = publication.record
        await self._count()
        self._catalog.restore(record.digest)
        previous = publication.previous
        if previous is None:
            return
        if record.pinned:
            await self._pins.refresh()
        with store_errors_translated():
            named = await in_thread(self._store.current_names, previous)
        if not named:
            self._catalog.retire(previous)

    def _drop(self, digest: str) -> None:
        self._engine.run(lambda: self._free(digest))

    def _free(self, digest: str) -> bool:
        """Free all that an adapter takes but its files; in the engine's thread."""
        if not self._residency.drop(digest):
            return False
        self._twins.drop(digest)
        return True
