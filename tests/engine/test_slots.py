"""Which adapter has which slot: least recently used out first, never one that is in use."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_server.model.slots import AdapterSlots, SlotState


class FakeModules:
    """Keeps what is installed; refuses to install over something, or ``"bad"``."""

    def __init__(self) -> None:
        self.installed: dict[int, str] = {}

    def install(self, slot: int, adapter: Any) -> None:
        assert slot not in self.installed, "installed over another adapter"
        if adapter == "bad":
            raise RuntimeError("cannot be copied")
        self.installed[slot] = adapter

    def remove(self, slot: int) -> None:
        del self.installed[slot]


class World:
    def __init__(self, count: int) -> None:
        self.modules = FakeModules()
        self.evictions = 0
        self.loads: list[str] = []
        self.slots = AdapterSlots(self.modules, count, self._evicted)  # type: ignore[arg-type]

    def _evicted(self) -> None:
        self.evictions += 1

    def acquire(self, digest: str) -> int | None:
        def load() -> Any:
            self.loads.append(digest)
            if digest == "missing":
                raise KeyError(digest)
            return digest

        slot = self.slots.acquire(digest, load)
        self.check()
        return slot

    def check(self) -> None:
        self.slots.check_integrity()
        assert sorted(self.modules.installed.values()) == sorted(self.slots.resident)


def test_a_resident_adapter_is_loaded_once_and_counted() -> None:
    world = World(2)
    first, second = world.acquire("a"), world.acquire("a")
    assert first == second is not None
    assert world.loads == ["a"]
    assert world.slots.references("a") == 2
    world.slots.release(first)
    assert world.slots.references("a") == 1
    assert world.slots.references("b") == 0
    world.slots.release(first)
    with pytest.raises(AssertionError, match="more often"):
        world.slots.release(first)


def test_the_least_recently_acquired_idle_adapter_goes_first() -> None:
    world = World(3)
    for digest in ("a", "b", "c", "a"):
        slot = world.acquire(digest)
        assert slot is not None
        world.slots.release(slot)
    assert world.acquire("d") is not None
    assert set(world.slots.resident) == {"a", "c", "d"}
    assert world.acquire("e") is not None
    assert set(world.slots.resident) == {"a", "d", "e"}
    assert world.evictions == 2


def test_an_adapter_in_use_is_neither_evicted_nor_overwritten() -> None:
    world = World(2)
    used = world.acquire("a")
    idle = world.acquire("b")
    assert idle is not None
    assert world.acquire("c") is None
    assert not world.slots.has_room()
    assert not world.slots.evict("a")
    world.slots.release(idle)
    assert world.slots.has_room()
    assert world.acquire("c") == idle
    assert world.modules.installed[used] == "a"  # type: ignore[index]


@pytest.mark.parametrize("bad", ["bad", "missing"])
@pytest.mark.parametrize("full", [False, True])
def test_a_failed_load_leaves_an_empty_slot(bad: str, full: bool) -> None:
    world = World(1)
    if full:
        slot = world.acquire("a")
        assert slot is not None
        world.slots.release(slot)
    with pytest.raises((RuntimeError, KeyError)):
        world.acquire(bad)
    world.check()
    assert not world.slots.is_resident(bad)
    assert world.slots.references(bad) == 0
    assert world.acquire("b") == 0


def test_evict_frees_the_slot_at_once() -> None:
    world = World(1)
    slot = world.acquire("a")
    assert slot is not None
    world.slots.release(slot)
    assert world.slots.evict("a")
    assert not world.slots.evict("a")
    assert (world.slots.resident, world.modules.installed, world.evictions) == ((), {}, 0)
    assert len(world.slots) == 1


@pytest.mark.parametrize("planted", ["digest", "state", "references", "forgotten"])
def test_the_check_finds_planted_corruption(planted: str) -> None:
    world = World(2)
    world.acquire("a")
    slot = world.slots._slots[0]
    if planted == "digest":
        slot.digest = "b"
    elif planted == "state":
        slot.state = SlotState.LOADING
    elif planted == "references":
        slot.references = -1
    else:
        world.slots._by_digest.clear()
    with pytest.raises(AssertionError):
        world.slots.check_integrity()


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["acquire", "release", "evict"]), st.sampled_from("abcdef"))
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_history(count: int, history: list[tuple[str, str]]) -> None:
    world = World(count)
    held: dict[str, list[int]] = {}
    for action, digest in history:
        if action == "acquire":
            slot = world.acquire(digest)
            in_use = {d for d, slots in held.items() if slots}
            assert (slot is None) == (digest not in in_use and len(in_use) == count)
            if slot is not None:
                held.setdefault(digest, []).append(slot)
        elif action == "evict":
            was = world.slots.is_resident(digest)
            assert world.slots.evict(digest) == (was and not held.get(digest))
        elif held.get(digest):
            world.slots.release(held[digest].pop())
        world.check()
        for user, slots in held.items():
            assert world.slots.references(user) == len(slots)
            assert all(world.modules.installed[slot] == user for slot in slots)
