"""Which adapters are on the device, in which slot, and who holds them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from manylora_server.model.modules import AdaptedModules
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


class AdapterSlots:
    """Device residency, least recently used first out; a slot with references is never touched.

    Owned by the engine's thread. ``on_evict`` is called when a resident adapter loses its slot to
    another one.
    """

    def __init__(
        self, modules: AdaptedModules, count: int, on_evict: Callable[[], None] = lambda: None
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
        """Digests of the adapters that are on the device."""
        return tuple(self._by_digest)

    def is_resident(self, digest: str) -> bool:
        """Whether the adapter has a slot."""
        return digest in self._by_digest

    def references(self, digest: str) -> int:
        """Return how many sequences hold the adapter's slot."""
        index = self._by_digest.get(digest)
        return 0 if index is None else self._slots[index].references

    def has_room(self) -> bool:
        """Whether a slot is empty or may be evicted."""
        return any(slot.references == 0 for slot in self._slots)

    def acquire(self, digest: str, load: Callable[[], CompiledAdapter]) -> int | None:
        """Return the adapter's slot with one more reference; ``None`` if every slot is in use.

        An adapter that is not resident is obtained from ``load`` and copied in; what ``load`` or
        the copy raises leaves the slot empty.
        """
        self._clock += 1
        index = self._by_digest.get(digest)
        if index is None:
            index = self._free_slot()
            if index is None:
                return None
            slot = self._slots[index]
            slot.state = SlotState.LOADING
            try:
                self._modules.install(index, load())
            except BaseException:
                slot.state = SlotState.EMPTY
                raise
            slot.state, slot.digest = SlotState.READY, digest
            self._by_digest[digest] = index
        slot = self._slots[index]
        slot.references += 1
        slot.last_used = self._clock
        return index

    def release(self, index: int) -> None:
        """Drop one reference; the adapter stays resident until its slot is needed."""
        slot = self._slots[index]
        assert slot.references > 0, "released more often than acquired"
        slot.references -= 1

    def evict(self, digest: str) -> bool:
        """Free the adapter's slot now; false if it is in use or not resident."""
        index = self._by_digest.get(digest)
        if index is None or self._slots[index].references:
            return False
        self._clear(index)
        return True

    def check_integrity(self) -> None:
        """Assert that the digests and the slots agree and that nothing idle is half loaded."""
        for digest, index in self._by_digest.items():
            slot = self._slots[index]
            assert slot.digest == digest
            assert slot.state is SlotState.READY
        for index, slot in enumerate(self._slots):
            assert slot.references >= 0
            ready = slot.state is SlotState.READY
            assert ready == (slot.digest is not None and self._by_digest.get(slot.digest) == index)
            if slot.state is not SlotState.READY:
                assert slot.references == 0, f"slot {index} is referenced but not ready"

    def _free_slot(self) -> int | None:
        for index, slot in enumerate(self._slots):
            if slot.state is SlotState.EMPTY:
                return index
        idle = [index for index, slot in enumerate(self._slots) if slot.references == 0]
        if not idle:
            return None
        index = min(idle, key=lambda i: self._slots[i].last_used)
        self._clear(index)
        self._on_evict()
        return index

    def _clear(self, index: int) -> None:
        slot = self._slots[index]
        assert slot.digest is not None
        self._modules.remove(index)
        del self._by_digest[slot.digest]
        slot.state, slot.digest = SlotState.EMPTY, None
