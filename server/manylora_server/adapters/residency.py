"""Brings adapters to the device: disk -> host memory -> slot, while the engine goes on stepping."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import Future

from manylora_server.adapters.host_tier import HostTier
from manylora_server.core.errors import AdapterLoadError, ManyloraError, OverloadedError
from manylora_server.core.observer import EngineObserver
from manylora_server.core.types import Readiness
from manylora_server.model.slots import AdapterSlots, SlotState
from manylora_store.compiler.canonical import CompiledAdapter

logger = logging.getLogger(__name__)

# An adapter's way into its slot may lengthen a step by this share of it.
INSTALL_SHARE = 0.1
_SHORTEST_INSTALL_S = 0.003


class Residency:
    """The engine's view of where adapters are. Only the engine's thread may call it.

    ``on_device`` is replaced, never changed, so that any thread may read it.
    """

    def __init__(self, slots: AdapterSlots, host: HostTier, observer: EngineObserver) -> None:
        self.slots = slots
        self.host = host
        self.on_device: frozenset[str] = frozenset()
        self.pinned: frozenset[str] = frozenset()
        self._held: set[str] = set()
        self._observer = observer
        self._interest: Counter[str] = Counter()
        self._promised: set[str] = set()
        self._asked: dict[str, list[Future[None]]] = {}
        self._pins_to_load: set[str] = set()
        self._began: dict[str, float] = {}
        self._failed: dict[str, AdapterLoadError] = {}
        self._install_s = float("inf")
        self._until = float("inf")

    @property
    def busy(self) -> bool:
        """Whether something is on its way to the device or asked for."""
        return bool(self._asked or self._pins_to_load or self.slots.loading)

    def expect(self, digest: str) -> None:
        """Take note of a new request for the adapter: it is loaded from now on."""
        self._interest[digest] += 1
        if self.slots.state(digest) is SlotState.EMPTY:
            self.host.request(digest)

    def forget(self, digest: str) -> None:
        """Take note that a request for the adapter has ended."""
        self._interest[digest] -= 1
        if not self._interest[digest]:
            del self._interest[digest]
            self._failed.pop(digest, None)
            if digest not in self._asked:
                self.host.cancel(digest)

    def load(self, digest: str) -> Future[None]:
        """Bring the adapter to the device for an operator; the result comes when it is there."""
        future: Future[None] = Future()
        self._asked.setdefault(digest, []).append(future)
        return future

    def pin(self, digests: frozenset[str]) -> None:
        """Keep the slots of ``digests``, and of no others, from now on; load those without one."""
        self.pinned = digests
        self._pins_to_load = {d for d in digests if self.slots.state(d) is SlotState.EMPTY}

    def hold(self, digest: str) -> None:
        """Keep the adapter's slot, once it has one, for work between steps."""
        self._held.add(digest)

    def let_go(self, digest: str) -> None:
        """End what ``hold`` began."""
        self._held.discard(digest)

    def refuse_asked(self, error: ManyloraError) -> None:
        """Answer all that operators asked for with ``error``: there will be no more steps."""
        self._pins_to_load.clear()
        for digest in list(self._asked):
            self._settle(digest, error)

    def drop(self, digest: str) -> bool:
        """Free the adapter's slot and host memory; false, and nothing done, if it is in use."""
        if self.slots.references(digest):
            return False
        self.slots.evict(digest)
        self.host.drop(digest)
        self._note_device()
        return True

    def note_step(self, seconds: float | None) -> None:
        """Bound the next step's installing by what the last took; ``None``: nothing ran."""
        if seconds is None:
            self._install_s = float("inf")
        else:
            self._install_s = max(_SHORTEST_INSTALL_S, INSTALL_SHARE * seconds)

    def begin_step(self) -> None:
        """Take promises back, and go on with what is on its way."""
        self._promised.clear()
        self._until = time.perf_counter() + self._install_s
        for digest in self.slots.loading:
            try:
                self._advance(digest)
            except AdapterLoadError as error:
                self._failed[digest] = error
        for digest in list(self._asked):
            self._answer(digest)
        for digest in list(self._pins_to_load):
            self._load_pinned(digest)

    def prepare(self, digests: Collection[str]) -> Readiness:
        """Say whether all of the adapters are ready, doing what can be done at once to make it so.

        They get slots together or not at all, so that two mixes cannot wait for each other's; and
        only once all of them are in host memory. Those that are ready or on their way keep their
        slots until the next step begins. Raises ``AdapterLoadError``.
        """
        for digest in digests:
            failed = self._failed.pop(digest, None)
            if failed is not None:
                raise failed
        missing = self._missing(digests)
        if len(digests) > 1 and len({*digests, *self.pinned}) > len(self.slots):
            raise AdapterLoadError(
                f"the mix needs {len(digests)} adapters on the device at once, but of its "
                f"{len(self.slots)} slots too many are pinned to others"
            )
        arrived: dict[str, CompiledAdapter] = {}
        for digest in missing:
            adapter = self.arrived(digest)
            if adapter is not None:
                arrived[digest] = adapter
        if len(arrived) < len(missing):
            return Readiness.LOADING
        if self.shortage(digests) > 0:
            return Readiness.NO_ROOM
        self._promised.update(digests)
        for digest, adapter in arrived.items():
            begun = self.slots.begin(digest, adapter, self._promised | self.pinned | self._held)
            assert begun, "there was room for all"
            self._began[digest] = time.perf_counter()
            self.host.taken(digest)
            self._note_device()
        ready = [self._advance(digest) for digest in digests]
        return Readiness.READY if all(ready) else Readiness.LOADING

    def arrived(self, digest: str) -> CompiledAdapter | None:
        """Return the adapter from host memory; where it is not there, have it brought first.

        Raises ``AdapterLoadError``.
        """
        try:
            adapter = self.host.peek(digest)
        except Exception as error:
            raise _load_error(digest, error) from error
        if adapter is None:
            self.host.request(digest, now=True)
        return adapter

    def shortage(self, digests: Collection[str]) -> int:
        """Return how many slots are lacking now for the adapters to be on the device together."""
        kept = {*self._promised, *self.pinned, *self._held, *digests}
        return max(0, len(self._missing(digests)) - self.slots.room(kept))

    def fits(self, digests: Iterable[str]) -> bool:
        """Whether there are slots enough for the adapters beside all that are pinned or held."""
        return len({*digests, *self.pinned, *self._held}) <= len(self.slots)

    def acquire(self, digest: str) -> int:
        """Return the slot of an adapter that ``prepare`` found ready, with one more reference."""
        return self.slots.acquire(digest)

    def release(self, slot: int) -> None:
        """Drop the reference."""
        self.slots.release(slot)

    def references(self, digest: str) -> int:
        """Return how many sequences hold the adapter's slot."""
        return self.slots.references(digest)

    def kept(self, digest: str) -> bool:
        """Whether the adapter's slot may not be given to another one in this step."""
        return digest in self._promised or digest in self.pinned or digest in self._held

    def check_integrity(self, live: Collection[str]) -> None:
        """Assert that exactly the requests for ``live`` (a digest per request) are expected."""
        self.slots.check_integrity()
        assert self._interest == Counter(live), "expected adapters and live requests disagree"
        assert self.on_device == frozenset(self.slots.resident)

    def _missing(self, digests: Iterable[str]) -> list[str]:
        return [digest for digest in digests if self.slots.state(digest) is SlotState.EMPTY]

    def _advance(self, digest: str) -> bool:
        try:
            ready = self.slots.advance(digest, self._until)
        except Exception as error:
            self._loaded(digest, succeeded=False)
            raise _load_error(digest, error) from error
        if ready and digest in self._began:
            self._loaded(digest, succeeded=True)
        return ready

    def _loaded(self, digest: str, *, succeeded: bool) -> None:
        seconds = time.perf_counter() - self._began.pop(digest)
        self._observer.on_adapter_load(seconds, tier="device", succeeded=succeeded)
        self._note_device()

    def _note_device(self) -> None:
        self.on_device = frozenset(self.slots.resident)

    def _answer(self, digest: str) -> None:
        """Go on with what an operator asked for, and answer once it is decided."""
        error: ManyloraError | None = None
        try:
            readiness = self.prepare((digest,))
        except AdapterLoadError as failure:
            error = failure
        else:
            if readiness is Readiness.LOADING:
                return
            if readiness is Readiness.NO_ROOM:
                error = OverloadedError(
                    f"all {len(self.slots)} adapter slots are in use or pinned; try again later, "
                    "or start the server with more --adapter-slots."
                )
                self.host.cancel(digest)
        self._settle(digest, error)

    def _settle(self, digest: str, error: ManyloraError | None) -> None:
        for future in self._asked.pop(digest):
            if not future.set_running_or_notify_cancel():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _load_pinned(self, digest: str) -> None:
        """Go on with bringing a pinned adapter in; it waits as long as every slot is in use."""
        try:
            readiness = self.prepare((digest,))
        except AdapterLoadError as error:
            logger.error("pinned adapter %s: %s", digest[:12], error.message)
            self._pins_to_load.discard(digest)
            return
        if readiness is Readiness.READY:
            self._pins_to_load.discard(digest)


def _load_error(digest: str, error: Exception) -> AdapterLoadError:
    return AdapterLoadError(f"the adapter could not be loaded: {error}", digest)
