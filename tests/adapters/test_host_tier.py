"""Host memory for adapters: bounded, loaded in the background, never what somebody waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from manylora_server.adapters.host_tier import HostTier
from manylora_server.core.observer import NullObserver
from manylora_store.compiler.canonical import CompiledAdapter, LowRank, ModulePatch
from manylora_store.records import AdapterRecord

SIZE = 400


def compiled(digest: str) -> CompiledAdapter:
    record = AdapterRecord(
        name="",
        digest=digest,
        peft_type="LORA",
        rank=1,
        ranks={},
        target_modules=(),
        parameters=100,
        bytes=SIZE,
        base_model=None,
        created_at=0.0,
        source="",
    )
    patch = ModulePatch(low_rank=LowRank(torch.ones(1, 60), torch.ones(1, 40), 1.0))
    return CompiledAdapter(record, {"m": patch})


class Loads(NullObserver):
    """A loader whose loads wait for ``gate`` and that counts; digests in ``broken`` fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.started: list[str] = []
        self.threads: set[int] = set()
        self.torch_threads: set[int] = set()
        self.observed: list[tuple[str, bool]] = []
        self.broken: set[str] = set()

    def __call__(self, digest: str) -> CompiledAdapter:
        self.started.append(digest)
        self.threads.add(threading.get_ident())
        self.torch_threads.add(torch.get_num_threads())
        assert self.gate.wait(60)
        if digest in self.broken:
            raise OSError("the disk is gone")
        return compiled(digest)

    def on_adapter_load(self, seconds: float, *, tier: str, succeeded: bool) -> None:
        self.observed.append((tier, succeeded))


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def tier(loads: Loads) -> Iterator[HostTier]:
    made = HostTier(loads, 4 * SIZE, loads)
    yield made
    loads.gate.set()
    made.close()


def taken(tier: HostTier, *digests: str) -> None:
    for digest in digests:
        tier.request(digest)
        tier.wait(60)
        tier.taken(digest)


def test_an_adapter_is_loaded_once_by_a_thread_of_its_own(tier: HostTier, loads: Loads) -> None:
    loads.gate.clear()
    for _ in range(3):
        tier.request("a")
    assert tier.peek("a") is None
    assert tier.busy
    loads.gate.set()
    tier.wait(60)
    found = tier.peek("a")
    assert found is not None
    assert found.record.digest == "a"
    tier.request("a")
    assert (loads.started, loads.observed) == (["a"], [("host", True)])
    assert loads.threads != {threading.get_ident()}
    assert loads.torch_threads == {1}
    assert (len(tier), tier.bytes, tier.busy) == (1, SIZE, False)


def test_the_least_recently_used_goes_first(tier: HostTier) -> None:
    taken(tier, "a", "b", "c", "d")
    taken(tier, "a")
    taken(tier, "e", "f")
    assert [d for d in "abcdef" if d in tier] == ["a", "d", "e", "f"]
    assert tier.bytes == 4 * SIZE


def test_what_somebody_waits_for_is_kept_and_the_rest_is_not_loaded_ahead(
    tier: HostTier, loads: Loads
) -> None:
    for digest in "abcdef":
        tier.request(digest)
    tier.wait(60)
    # Half of the memory, for requests whose adapters are not on the device yet.
    assert loads.started == ["a", "b"]
    assert tier.peek("c") is None
    tier.taken("a")
    tier.wait(60)
    assert loads.started == ["a", "b", "c"]
    tier.cancel("b")
    tier.cancel("d")
    tier.wait(60)
    assert loads.started == ["a", "b", "c", "e"]


def test_what_is_needed_now_goes_before_what_is_needed_later(tier: HostTier, loads: Loads) -> None:
    for digest in "abcd":
        tier.request(digest)
    tier.wait(60)
    tier.request("d", now=True)
    tier.wait(60)
    assert loads.started == ["a", "b", "d"]


def test_one_larger_than_the_memory_is_loaded_and_goes_when_taken(loads: Loads) -> None:
    tier = HostTier(loads, SIZE // 2, loads)
    tier.request("a")
    tier.wait(60)
    assert tier.peek("a") is not None
    tier.taken("a")
    assert (len(tier), tier.bytes) == (0, 0)
    tier.close()


def test_a_failed_load_is_told_once_and_tried_again_when_asked(
    tier: HostTier, loads: Loads
) -> None:
    loads.broken.add("a")
    tier.request("a")
    tier.wait(60)
    with pytest.raises(OSError, match="disk is gone"):
        tier.peek("a")
    assert tier.peek("a") is None
    loads.broken.clear()
    tier.request("a")
    tier.wait(60)
    assert tier.peek("a") is not None
    assert loads.observed == [("host", False), ("host", True)]


def test_dropping_frees_the_memory_at_once(tier: HostTier) -> None:
    taken(tier, "a")
    assert tier.drop("a")
    assert not tier.drop("a")
    assert (tier.bytes, "a" in tier) == (0, False)


def test_whoever_waits_is_woken_after_each_load(tier: HostTier, loads: Loads) -> None:
    woken = threading.Semaphore(0)
    tier.on_loaded = woken.release
    loads.broken.add("b")
    tier.request("a")
    tier.request("b")
    for _ in range(2):
        assert woken.acquire(timeout=60)
