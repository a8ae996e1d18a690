"""From disk to a device slot, with a real tiny model and without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from manylora_server.adapters.residency import Residency
from manylora_server.core.errors import AdapterLoadError, NotReadyError, OverloadedError
from manylora_server.core.types import Readiness
from manylora_server.engine.async_engine import AsyncEngine
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import build, inner

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("residency")
    base = save_model("llama", root / "base")
    for seed, name in enumerate(NAMES):
        save_adapter(base, lora("llama", r=2 + seed), root / name, seed)
    return root


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[AsyncEngine]:
    adapters = {name: folder / name for name in NAMES}
    made = build(folder / "base", tmp_path, adapters=adapters, adapter_slots=2)
    yield made
    made.close()


@pytest.fixture
def residency(engine: AsyncEngine) -> Residency:
    return inner(engine).residency


@pytest.fixture
def digests(engine: AsyncEngine) -> dict[str, str]:
    return {name: engine.adapters.resolve(name).digest for name in NAMES}


def bring(residency: Residency, *wanted: str) -> Readiness:
    """Step as the engine would until it is decided."""
    for _ in range(100):
        residency.begin_step()
        readiness = residency.prepare(wanted)
        if readiness is not Readiness.LOADING:
            return readiness
        residency.host.wait(60)
    raise AssertionError("it never came")


def test_an_adapter_comes_from_disk_to_host_to_device(
    residency: Residency, digests: dict[str, str]
) -> None:
    a = digests["a"]
    residency.begin_step()
    assert residency.prepare((a,)) is Readiness.LOADING
    residency.host.wait(60)
    assert (a in residency.host, residency.on_device) == (True, frozenset())
    assert residency.prepare((a,)) is Readiness.READY
    assert residency.on_device == {a}
    residency.check_integrity([])


def test_a_load_begins_when_a_request_is_expected(
    residency: Residency, digests: dict[str, str]
) -> None:
    residency.expect(digests["a"])
    residency.host.wait(60)
    assert digests["a"] in residency.host
    residency.check_integrity([digests["a"]])
    residency.forget(digests["a"])
    residency.check_integrity([])


def test_a_promise_lasts_until_the_next_step(residency: Residency, digests: dict[str, str]) -> None:
    for digest in digests.values():
        residency.host.request(digest)
    residency.host.wait(60)
    residency.begin_step()
    assert residency.prepare((digests["a"],)) is Readiness.READY
    assert residency.prepare((digests["b"],)) is Readiness.READY
    assert residency.prepare((digests["c"],)) is Readiness.NO_ROOM
    residency.begin_step()
    assert residency.prepare((digests["c"],)) is Readiness.READY
    assert residency.on_device == {digests["b"], digests["c"]}


def test_a_mix_waits_for_host_memory_without_a_slot(
    residency: Residency, digests: dict[str, str]
) -> None:
    a, b, c = (digests[name] for name in "abc")
    residency.host.request(a)
    residency.host.wait(60)
    residency.begin_step()
    assert residency.prepare((a, b)) is Readiness.LOADING
    assert residency.on_device == frozenset()
    assert residency.slots.loading == ()
    # So both slots can be used meanwhile.
    assert bring(residency, c) is Readiness.READY
    assert residency.prepare((a,)) is Readiness.READY
    assert bring(residency, a, b) is Readiness.READY
    assert residency.on_device == {a, b}


def test_a_mix_gets_slots_for_all_or_for_none(
    residency: Residency, digests: dict[str, str]
) -> None:
    a, b, c, d = (digests[name] for name in NAMES)
    assert bring(residency, a, b) is Readiness.READY
    slot = residency.acquire(a)
    for digest in (c, d):
        residency.host.request(digest)
    residency.host.wait(60)
    residency.begin_step()
    assert residency.shortage((c, d)) == 1
    assert residency.prepare((c, d)) is Readiness.NO_ROOM
    assert residency.on_device == {a, b}
    assert (residency.shortage((a, c)), residency.shortage((a, b))) == (0, 0)
    assert residency.prepare((a, c)) is Readiness.READY
    assert residency.shortage((b,)) == 1
    residency.release(slot)
    residency.begin_step()
    assert residency.prepare((c, d)) is Readiness.READY
    assert residency.on_device == {c, d}


def test_a_mix_that_cannot_fit_beside_the_pinned_ones_fails(
    residency: Residency, digests: dict[str, str]
) -> None:
    a, b, c = (digests[name] for name in "abc")
    residency.pin(frozenset({a}))
    assert residency.fits((a, b))
    assert not residency.fits((b, c))
    residency.hold(b)
    assert residency.fits((a, b))
    assert not residency.fits((a, c))
    residency.let_go(b)
    assert residency.fits((a, c))
    residency.begin_step()
    with pytest.raises(AdapterLoadError, match="needs 2 adapters on the device at once") as caught:
        residency.prepare((b, c))
    assert caught.value.digest is None
    assert bring(residency, a, b) is Readiness.READY


def test_a_pinned_adapter_comes_by_itself_and_stays(
    residency: Residency, digests: dict[str, str]
) -> None:
    residency.pin(frozenset({digests["a"]}))
    assert residency.busy
    for _ in range(100):
        residency.begin_step()
        if not residency.busy:
            break
        residency.host.wait(60)
    assert residency.on_device == {digests["a"]}
    for name in ("b", "c", "d", "b"):
        assert bring(residency, digests[name]) is Readiness.READY
    assert residency.on_device == {digests["a"], digests["b"]}
    residency.pin(frozenset())
    assert bring(residency, digests["c"]) is Readiness.READY
    assert residency.on_device == {digests["b"], digests["c"]}


def test_dropping_frees_slot_and_host_memory_but_nothing_in_use(
    residency: Residency, digests: dict[str, str]
) -> None:
    a = digests["a"]
    assert bring(residency, a) is Readiness.READY
    slot = residency.acquire(a)
    assert not residency.drop(a)
    assert residency.on_device == {a}
    residency.release(slot)
    assert residency.drop(a)
    assert (residency.on_device, a in residency.host) == (frozenset(), False)
    assert residency.slots._modules.resident_bytes() == 0  # type: ignore[attr-defined]
    residency.check_integrity([])


def asked(residency: Residency, digest: str) -> Future[None]:
    future = residency.load(digest)
    for _ in range(100):
        residency.begin_step()
        if future.done():
            break
        residency.host.wait(60)
    return future


def test_what_an_operator_asks_for_is_answered_once_it_is_there(
    residency: Residency, digests: dict[str, str]
) -> None:
    future = asked(residency, digests["a"])
    assert future.result(0) is None
    assert digests["a"] in residency.on_device
    assert not residency.busy


def test_an_operator_is_told_when_every_slot_is_in_use(
    residency: Residency, digests: dict[str, str]
) -> None:
    held = []
    for name in ("a", "b"):
        bring(residency, digests[name])
        held.append(residency.acquire(digests[name]))
    with pytest.raises(OverloadedError, match="all 2 adapter slots"):
        asked(residency, digests["c"]).result(0)
    residency.release(held[0])
    assert asked(residency, digests["c"]).result(0) is None


def test_an_operator_who_has_gone_is_not_answered(
    residency: Residency, digests: dict[str, str]
) -> None:
    future = residency.load(digests["a"])
    assert future.cancel()
    bring(residency, digests["a"])
    residency.begin_step()
    assert not residency.busy


def test_when_the_engine_stops_nobody_waits_for_ever(
    residency: Residency, digests: dict[str, str]
) -> None:
    future = residency.load(digests["a"])
    residency.pin(frozenset({digests["b"]}))
    residency.refuse_asked(NotReadyError("it stops."))
    with pytest.raises(NotReadyError):
        future.result(0)
    assert not residency.busy


def test_an_adapter_whose_files_are_gone_fails_who_wants_it_and_can_come_back(
    engine: AsyncEngine, residency: Residency, digests: dict[str, str], tmp_path: Path
) -> None:
    blobs = tmp_path / "blobs"
    blobs.rename(tmp_path / "away")
    with pytest.raises(AdapterLoadError):
        bring(residency, digests["a"])
    (tmp_path / "away").rename(blobs)
    assert bring(residency, digests["a"]) is Readiness.READY
