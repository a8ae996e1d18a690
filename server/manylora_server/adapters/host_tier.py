"""Compiled adapters in host memory: loaded in the background, least recently used first out."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import torch

from manylora_server.core.observer import EngineObserver
from manylora_server.model.host_copy import adapter_bytes
from manylora_store.compiler.canonical import CompiledAdapter

logger = logging.getLogger(__name__)

_NICE = 10


class HostTier:
    """At most ``max_bytes`` of adapters, by digest, and the thread that loads them with ``load``.

    A requested adapter is kept until it is taken or the request is cancelled; of those at most
    half of ``max_bytes`` are loaded ahead (one always, and one that is asked for ``now``), so that
    a long queue of requests for different adapters does not push out what it is waiting for.
    Thread-safe. ``on_loaded`` is called in the loading thread after each load, failed or not. The
    thread begins with ``warm_up``, when it is started or first needed.
    """

    def __init__(
        self,
        load: Callable[[str], CompiledAdapter],
        max_bytes: int,
        observer: EngineObserver,
        warm_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._warm_up = warm_up
        self.max_bytes = max_bytes
        self.on_loaded: Callable[[], None] = lambda: None
        self._load = load
        self._observer = observer
        self._changed = threading.Condition()
        self._entries: OrderedDict[str, CompiledAdapter] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._untaken: set[str] = set()
        self._pending: OrderedDict[str, None] = OrderedDict()
        self._wanted_now: set[str] = set()
        self._failed: dict[str, Exception] = {}
        self._loading: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        with self._changed:
            return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        with self._changed:
            return digest in self._entries

    @property
    def bytes(self) -> int:
        """Memory of all adapters held."""
        with self._changed:
            return sum(self._sizes.values())

    @property
    def busy(self) -> bool:
        """Whether a load is under way or waits for the thread."""
        with self._changed:
            return self._loading is not None or bool(self._pending)

    def start(self) -> None:
        """Start the thread, unless it runs."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name="manylora-loader", daemon=True
                )
                self._thread.start()

    def request(self, digest: str, *, now: bool = False) -> None:
        """Have the adapter loaded, unless it is here, and kept until taken or cancelled."""
        self.start()
        with self._changed:
            if digest in self._entries:
                self._entries.move_to_end(digest)
                self._untaken.add(digest)
            elif digest != self._loading:
                self._pending.setdefault(digest)
                if now:
                    self._wanted_now.add(digest)
                    self._pending.move_to_end(digest, last=False)
                self._changed.notify_all()
            else:
                self._untaken.add(digest)

    def peek(self, digest: str) -> CompiledAdapter | None:
        """Return the adapter if it is here. Raises, once, what loading it raised."""
        with self._changed:
            error = self._failed.pop(digest, None)
            if error is not None:
                raise error
            return self._entries.get(digest)

    def taken(self, digest: str) -> None:
        """Take note that the adapter was copied to the device: it may leave when others come."""
        with self._changed:
            self._untaken.discard(digest)
            if digest in self._entries:
                self._entries.move_to_end(digest)
            self._evict()
            self._changed.notify_all()

    def cancel(self, digest: str) -> None:
        """Take note that nobody waits for the adapter any more."""
        with self._changed:
            self._pending.pop(digest, None)
            self._wanted_now.discard(digest)
            self._failed.pop(digest, None)
            self._untaken.discard(digest)
            self._changed.notify_all()

    def drop(self, digest: str) -> bool:
        """Free the adapter's memory now; false if it is not here."""
        with self._changed:
            self._untaken.discard(digest)
            self._sizes.pop(digest, None)
            return self._entries.pop(digest, None) is not None

    def wait(self, seconds: float) -> None:
        """Wait until no load is under way or pending, at most ``seconds``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._loading is None and self._next() is None, timeout=seconds
            )

    def close(self) -> None:
        """End the thread after its current load."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _next(self) -> str | None:
        """Return what may be loaded next."""
        digest = next(iter(self._pending), None)
        if digest is None or digest in self._wanted_now or not self._untaken:
            return digest
        ahead = sum(self._sizes[held] for held in self._untaken if held in self._sizes)
        return digest if 2 * ahead < self.max_bytes else None

    def _run(self) -> None:
        # One OpenMP thread: a second team of workers would slow the engine's (decision 5).
        torch.set_num_threads(1)
        # A step waits for its slowest worker, so it is this thread that must wait for a core.
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            self._warm_up()
        except Exception:
            # Each load will meet it again, and tell whoever waits for it.
            logger.exception("getting ready for the first adapter failed")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
                digest = self._next()
                assert digest is not None
                del self._pending[digest]
                self._wanted_now.discard(digest)
                self._loading = digest
                self._untaken.add(digest)
            self._load_one(digest)
            self.on_loaded()

    def _load_one(self, digest: str) -> None:
        start = time.perf_counter()
        loaded: CompiledAdapter | None = None
        failure: Exception | None = None
        try:
            loaded = self._load(digest)
        except Exception as error:
            logger.exception("adapter %s could not be loaded", digest[:12])
            failure = error
        self._observer.on_adapter_load(
            time.perf_counter() - start, tier="host", succeeded=failure is None
        )
        with self._changed:
            self._loading = None
            if loaded is not None:
                self._entries[digest] = loaded
                self._sizes[digest] = adapter_bytes(loaded)
                self._evict(spare=digest)
            elif failure is not None:
                self._untaken.discard(digest)
                self._failed[digest] = failure
            self._changed.notify_all()

    def _evict(self, spare: str | None = None) -> None:
        """Let the oldest adapters go that nobody waits for, until the rest fits."""
        total = sum(self._sizes.values())
        for digest in list(self._entries):
            if total <= self.max_bytes:
                return
            if digest not in self._untaken and digest != spare:
                total -= self._sizes.pop(digest)
                del self._entries[digest]
