"""Which adapter has which slot: least recently used out first, never one that is in use."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_server.model.slots import AdapterSlots, SlotState


class FakeAdapter:
    """Two modules' worth of patches; ``"bad"`` fails at its second."""

    def __init__(self, digest: str) -> None:
        self.patches = {"first": digest, "second": digest}


class FakeModules:
    """Keeps what is installed; refuses to install over something, or ``"bad"``."""

    copy_stream = None

    def __init__(self) -> None:
        self.installed: dict[int, list[str]] = {}
        self._name = ""

    def module(self, name: str) -> FakeModules:
        self._name = name
        return self

    def reserve(self, slot: int, patch: Any) -> None:
        if self._name == "first":
            assert slot not in self.installed, "installed over another adapter"
        self.installed.setdefault(slot, []).append(patch)

    def fill(self, slot: int, patch: Any) -> None:
        if patch == "bad" and self._name == "second":
            raise RuntimeError("cannot be copied")

    def remove(self, slot: int) -> None:
        del self.installed[slot]

    def settle(self) -> None:
        raise AssertionError("there is no copy stream")


class World:
    def __init__(self, count: int) -> None:
        self.modules = FakeModules()
        self.evictions = 0
        self.slots = AdapterSlots(self.modules, count, self._evicted)  # type: ignore[arg-type]

    def _evicted(self) -> None:
        self.evictions += 1

    def acquire(self, digest: str, kept: tuple[str, ...] = ()) -> int | None:
        """Install the adapter at once where there is room; return its slot, referenced."""
        slots = self.slots
        if slots.state(digest) is SlotState.EMPTY:
            if not slots.begin(digest, FakeAdapter(digest), kept):  # type: ignore[arg-type]
                return None
            assert slots.advance(digest, math.inf)
        slot = slots.acquire(digest)
        self.check()
        return slot

    def check(self) -> None:
        self.slots.check_integrity()
        held = sorted(self.modules.installed.values())
        assert held == sorted([digest, digest] for digest in self.slots.resident)


def test_a_resident_adapter_is_counted() -> None:
    world = World(2)
    first, second = world.acquire("a"), world.acquire("a")
    assert first == second is not None
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
    assert not world.slots.evict("a")
    world.slots.release(idle)
    assert world.acquire("c") == idle
    assert world.modules.installed[used] == ["a", "a"]  # type: ignore[index]


def test_what_is_kept_is_not_given_away() -> None:
    world = World(2)
    for digest in ("a", "b"):
        slot = world.acquire(digest)
        assert slot is not None
        world.slots.release(slot)
    assert world.acquire("c", kept=("a", "b")) is None
    assert world.acquire("c", kept=("a",)) == 1
    assert world.slots.resident == ("a", "c")


def test_an_adapter_comes_module_by_module_and_cannot_be_used_before_the_last() -> None:
    world = World(1)
    assert world.slots.begin("a", FakeAdapter("a"))  # type: ignore[arg-type]
    assert world.slots.state("a") is SlotState.LOADING
    assert not world.slots.advance("a")
    assert world.modules.installed == {0: ["a"]}
    assert (world.slots.resident, world.slots.loading) == ((), ("a",))
    with pytest.raises(AssertionError, match="not on the device"):
        world.slots.acquire("a")
    assert not world.slots.begin("b", FakeAdapter("b"))  # type: ignore[arg-type]
    world.slots.check_integrity()
    assert not world.slots.advance("a")
    assert world.slots.advance("a")
    assert (world.slots.resident, world.slots.loading) == (("a",), ())
    world.check()


def test_an_adapter_on_its_way_can_be_taken_back() -> None:
    world = World(1)
    world.slots.begin("a", FakeAdapter("a"))  # type: ignore[arg-type]
    world.slots.advance("a")
    assert world.slots.evict("a")
    world.check()
    assert world.acquire("b") == 0


@pytest.mark.parametrize("full", [False, True])
def test_a_failed_copy_leaves_an_empty_slot(full: bool) -> None:
    world = World(1)
    if full:
        slot = world.acquire("a")
        assert slot is not None
        world.slots.release(slot)
    with pytest.raises(RuntimeError, match="cannot be copied"):
        world.acquire("bad")
    world.check()
    assert world.slots.state("bad") is SlotState.EMPTY
    assert world.slots.references("bad") == 0
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
            was = digest in world.slots.resident
            assert world.slots.evict(digest) == (was and not held.get(digest))
        elif held.get(digest):
            world.slots.release(held[digest].pop())
        world.check()
        for user, slots in held.items():
            assert world.slots.references(user) == len(slots)
            assert all(world.modules.installed[slot] == [user, user] for slot in slots)
