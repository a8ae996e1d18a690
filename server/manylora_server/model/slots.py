"""Which adapters are on the device, in which slot, and who holds them there."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from manylora_server.model.installation import Installation, PatchedModules
from manylora_store.compiler.canonical import CompiledAdapter


class SlotState(Enum):
    """A slot's life: EMPTY -> LOADING -> READY -> EMPTY."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.EMPTY
    digest: str | None = None
    references: int = 0
    last_used: int = 0
    installation: Installation | None = None


class AdapterSlots:
    """Device residency, least recently used first out.

    A slot with references is never touched, nor is one whose adapter is in ``kept`` (what
    operators pinned, and what this step has promised to somebody). Owned by the engine's thread.
    ``on_evict`` is called when a resident adapter loses its slot to another one.
    """

    def __init__(
        self, modules: PatchedModules, count: int, on_evict: Callable[[], None] = lambda: None
    ) -> None:
        self._modules = modules
        self._slots = [_Slot() for _ in range(count)]
        self._by_digest: dict[str, int] = {}
        self._clock = 0
        self._on_evict = on_evict

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters that are on the device, ready to be used."""
        return tuple(d for d, i in self._by_digest.items() if self._is(i, SlotState.READY))

    @property
    def loading(self) -> tuple[str, ...]:
        """Digests of the adapters on their way into a slot."""
        return tuple(d for d, i in self._by_digest.items() if self._is(i, SlotState.LOADING))

    def state(self, digest: str) -> SlotState:
        """Return the state of the adapter's slot; ``EMPTY`` if it has none."""
        index = self._by_digest.get(digest)
        return SlotState.EMPTY if index is None else self._slots[index].state

    def references(self, digest: str) -> int:
        """Return how many sequences hold the adapter's slot."""
        index = self._by_digest.get(digest)
        return 0 if index is None else self._slots[index].references

    def room(self, kept: Collection[str] = ()) -> int:
        """Return how many adapters could be begun now: slots empty, or idle and not kept."""
        empty = sum(slot.state is SlotState.EMPTY for slot in self._slots)
        return empty + len(self._idle(kept))

    def slot_of(self, digest: str) -> int:
        """Return the slot of a ready adapter, without a reference."""
        index = self._by_digest[digest]
        assert self._is(index, SlotState.READY), "the adapter is not on the device"
        return index

    def begin(self, digest: str, adapter: CompiledAdapter, kept: Collection[str] = ()) -> bool:
        """Start to install ``adapter`` in an empty slot or in place of an idle adapter.

        Returns false, and changes nothing, where every slot is in use, loading or kept.
        """
        assert digest not in self._by_digest
        index = self._free_slot(kept)
        if index is None:
            return False
        slot = self._slots[index]
        slot.state, slot.digest = SlotState.LOADING, digest
        slot.installation = Installation(self._modules, index, adapter)
        self._by_digest[digest] = index
        self._touch(slot)
        return True

    def advance(self, digest: str, until: float = 0.0) -> bool:
        """Go on installing until ``time.perf_counter()`` passes ``until``; true once it is ready.

        What the copy raises leaves the slot empty.
        """
        slot = self._slots[self._by_digest[digest]]
        if slot.state is SlotState.READY:
            return True
        assert slot.installation is not None
        try:
            ready = slot.installation.advance(until)
        except BaseException:
            self._forget(slot)
            raise
        if ready:
            slot.state, slot.installation = SlotState.READY, None
        return ready

    def acquire(self, digest: str) -> int:
        """Return the slot of a ready adapter, with one more reference."""
        index = self._by_digest[digest]
        slot = self._slots[index]
        assert slot.state is SlotState.READY, "the adapter is not on the device"
        slot.references += 1
        self._touch(slot)
        return index

    def release(self, index: int) -> None:
        """Drop one reference; the adapter stays resident until its slot is needed."""
        slot = self._slots[index]
        assert slot.references > 0, "released more often than acquired"
        slot.references -= 1

    def evict(self, digest: str) -> bool:
        """Free the adapter's slot now; false if it is in use or has none."""
        index = self._by_digest.get(digest)
        if index is None or self._slots[index].references:
            return False
        self._clear(index)
        return True

    def check_integrity(self) -> None:
        """Assert that the digests and the slots agree and that nothing idle is half loaded."""
        for digest, index in self._by_digest.items():
            assert self._slots[index].digest == digest
        for index, slot in enumerate(self._slots):
            assert slot.references >= 0
            known = slot.digest is not None and self._by_digest.get(slot.digest) == index
            assert known == (slot.state is not SlotState.EMPTY)
            assert (slot.installation is not None) == (slot.state is SlotState.LOADING)
            if slot.state is not SlotState.READY:
                assert slot.references == 0, f"slot {index} is referenced but not ready"

    def _is(self, index: int, state: SlotState) -> bool:
        return self._slots[index].state is state

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock

    def _free_slot(self, kept: Collection[str]) -> int | None:
        for index, slot in enumerate(self._slots):
            if slot.state is SlotState.EMPTY:
                return index
        idle = self._idle(kept)
        if not idle:
            return None
        index = min(idle, key=lambda i: self._slots[i].last_used)
        self._clear(index)
        self._on_evict()
        return index

    def _idle(self, kept: Collection[str]) -> list[int]:
        return [
            index
            for index, slot in enumerate(self._slots)
            if slot.state is SlotState.READY and not slot.references and slot.digest not in kept
        ]

    def _clear(self, index: int) -> None:
        slot = self._slots[index]
        if slot.installation is not None:
            slot.installation.cancel()
        else:
            self._modules.remove(index)
        self._forget(slot)

    def _forget(self, slot: _Slot) -> None:
        assert slot.digest is not None
        del self._by_digest[slot.digest]
        slot.state, slot.digest, slot.installation = SlotState.EMPTY, None, None
