"""Exports of a running engine: queue, progress, cancellation, errors, and what each leaves."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manylora_server.core.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    ExportNotFoundError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    StorageError,
)
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.export import export as export_module
from manylora_server.export import jobs as jobs_module
from manylora_server.export.job import ENDED, ExportRequest
from manylora_server.export.jobs import ExportService
from manylora_server.export.progress import Progress
from manylora_store.export.methods import Recipe
from support.adapters import lora, save_adapter
from support.exporting import assert_same, load, with_peft
from support.models import save_model
from support.serving import build

WAIT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    base = save_model("llama", folder / "base")
    save_adapter(base, lora("llama"), folder / "a", 1)
    save_adapter(base, lora("llama", use_dora=True), folder / "dora", 2)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def engine(folder: Path, home: Path) -> Iterator[AsyncEngine]:
    engine = build(folder / "base", home, adapters={n: folder / n for n in ("a", "dora")})
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def service(engine: AsyncEngine, home: Path) -> Iterator[ExportService]:
    """The engine's service, which has nothing to do before and after."""
    service = engine.export_service
    yield service
    for job in service.list(limit=1000, after=None)[0]:
        asyncio.run(service.cancel(job["id"]))
    shutil.rmtree(home / "exports", ignore_errors=True)
    assert engine.adapters.in_use("a") == 0


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the comparison, which takes seconds, where something else is tested."""
    monkeypatch.setattr(
        export_module,
        "_compare",
        lambda *_: {"prompts": 0, "positions": 0, "same_base": {"skipped": "x"}},
    )


def asked(output: str = "out", **changes: Any) -> ExportRequest:
    settings: dict[str, Any] = {"adapters": {"a": 1.0}, "recipe": Recipe(), **changes}
    return ExportRequest(output=output, **settings)


def start(service: ExportService, request: ExportRequest) -> dict[str, Any]:
    return asyncio.run(service.start(request))


def ended(service: ExportService, identity: str) -> dict[str, Any]:
    async def wait() -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while service.get(identity)["state"] not in ENDED:
                await asyncio.sleep(0.01)
        return service.get(identity)

    return asyncio.run(wait())


class Gate:
    """Holds every export where it takes its first step, until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        advance = Progress.advance

        def wait(progress: Progress, amount: int) -> None:
            self.reached.set()
            while not self.open.wait(0.01):
                progress.check()
            advance(progress, amount)

        monkeypatch.setattr(Progress, "advance", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_an_export_is_a_checkpoint_with_a_report(
    service: ExportService, folder: Path, home: Path
) -> None:
    job = start(service, asked())
    assert job["state"] in ("queued", "running")
    assert job["path"] is job["report"] is job["error"] is None
    job = ended(service, job["id"])
    assert job["state"] == "done", job["error"]
    assert (job["progress"], job["seconds_left"], job["error"]) == (1.0, 0.0, None)
    assert job["path"] == str(home / "exports" / "out")
    assert_same(load(Path(job["path"])), with_peft(folder / "base", folder / "a"))
    same = job["report"]["equivalence"]["same_base"]
    assert same["max_relative_error"] < 1e-4
    assert same["top1_agreement"] == 1.0
    assert same["base"] == "dense weights in float32, as served"
    assert job["report"]["base"]["weights"] == "dense"


def test_one_adapter_folder(service: ExportService, folder: Path) -> None:
    job = start(service, asked(adapters={"a": 0.5}, adapter_only=True))
    job = ended(service, job["id"])
    assert job["state"] == "done", job["error"]
    peft = with_peft(folder / "base", Path(job["path"]))
    assert peft.peft_config["default"].r == 4


def test_a_refusal_of_the_adapters_fails_the_job(service: ExportService) -> None:
    job = start(service, asked(adapters={"a": 0.5, "dora": 0.5}))
    job = ended(service, job["id"])
    assert job["state"] == "failed"
    assert job["error"]["code"] == "adapter_unsupported"
    assert "'dora' can only be taken alone and with weight 1" in job["error"]["message"]
    assert job["path"] is None


def test_cancelled_while_running_or_waiting_nothing_is_left(
    service: ExportService, gate: Gate, home: Path, unchecked: None
) -> None:
    first = start(service, asked("one"))
    assert gate.reached.wait(WAIT_S)
    second = start(service, asked("two"))
    assert service.get(second["id"])["state"] == "queued"
    assert asyncio.run(service.cancel(second["id"]))["state"] == "cancelled"
    assert asyncio.run(service.cancel(first["id"]))["state"] == "cancelled"
    assert list((home / "exports").iterdir()) == []
    # The next one is made all the same.
    gate.open.set()
    third = start(service, asked("one"))
    assert ended(service, third["id"])["state"] == "done"
    # It has ended, so cancelling it changes nothing.
    assert asyncio.run(service.cancel(third["id"]))["state"] == "done"
    listed, more = service.list(limit=2, after=None)
    assert [job["id"] for job in listed] == [third["id"], second["id"]]
    assert more
    rest, _ = service.list(limit=1, after=second["id"])
    assert [job["id"] for job in rest] == [first["id"]]


def test_an_adapter_stays_while_an_export_needs_it(
    engine: AsyncEngine, service: ExportService, gate: Gate, folder: Path, unchecked: None
) -> None:
    asyncio.run(engine.adapter_service.add_source("b", str(folder / "a")))
    job = start(service, asked(adapters={"b": 1.0}))
    assert gate.reached.wait(WAIT_S)
    assert engine.adapters.in_use("b") == 1
    with pytest.raises(AdapterInUseError):
        asyncio.run(engine.adapter_service.remove("b", drain=False))
    gate.open.set()
    assert ended(service, job["id"])["state"] == "done"
    assert engine.adapters.in_use("b") == 0
    asyncio.run(engine.adapter_service.remove("b", drain=False))


def test_the_queue_is_bounded(
    service: ExportService, gate: Gate, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_QUEUED", 1)
    start(service, asked("one"))
    assert gate.reached.wait(WAIT_S)
    start(service, asked("two"))
    with pytest.raises(OverloadedError, match="1 exports are waiting"):
        start(service, asked("three"))
    assert engine.adapters.in_use("a") == 2


def test_two_exports_cannot_have_one_output(service: ExportService, gate: Gate) -> None:
    start(service, asked("one"))
    assert gate.reached.wait(WAIT_S)
    with pytest.raises(InvalidRequestError, match="is about to write 'one'"):
        start(service, asked("one"))


@pytest.mark.parametrize(
    "output", ["", "..", "../up", "/etc/x", "a/b", "a\\b", ".hidden", "x" * 129, "a\0b", "a\n"]
)
def test_an_output_is_a_name(output: str, service: ExportService) -> None:
    with pytest.raises(InvalidRequestError, match="is not a name for a folder") as caught:
        start(service, asked(output))
    assert caught.value.param == "output"


def test_an_output_must_not_exist(service: ExportService, home: Path, tmp_path: Path) -> None:
    (home / "exports" / "there").mkdir(parents=True)
    with pytest.raises(InvalidRequestError, match="exists already"):
        start(service, asked("there"))
    (home / "exports" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidRequestError, match="exists already"):
        start(service, asked("link"))


def test_a_full_disk_is_told_before_the_work(
    service: ExportService, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="has 1000 left"):
        start(service, asked())


def test_unknown_adapters_and_exports_are_named(service: ExportService) -> None:
    with pytest.raises(AdapterNotFoundError, match="'nobody'"):
        start(service, asked(adapters={"nobody": 1.0}))
    for call in (service.get, lambda identity: service.list(limit=1, after=identity)):
        with pytest.raises(ExportNotFoundError, match="no export 'exp-1'"):
            call("exp-1")


def test_a_server_that_stops_cancels_what_it_exports(
    folder: Path, tmp_path: Path, gate: Gate
) -> None:
    engine = build(folder / "base", tmp_path / "home", adapters={"a": folder / "a"})
    engine.start()
    service = engine.export_service
    running = start(service, asked("one"))
    assert gate.reached.wait(WAIT_S)
    waiting = start(service, asked("two"))
    engine.close()
    for job in (running, waiting):
        assert service.get(job["id"])["state"] == "cancelled"
    assert list((tmp_path / "home" / "exports").iterdir()) == []
    with pytest.raises(NotReadyError):
        service._enqueue(service._jobs[running["id"]])


def test_a_quantized_base_is_exported_from_its_dense_original(folder: Path, tmp_path: Path) -> None:
    engine = build(
        folder / "base", tmp_path / "home", adapters={"a": folder / "a"}, quantization="nf4"
    )
    engine.start()
    try:
        job = start(engine.export_service, asked())
        job = ended(engine.export_service, job["id"])
    finally:
        engine.close()
    assert job["state"] == "done", job["error"]
    assert_same(load(Path(job["path"])), with_peft(folder / "base", folder / "a"))
    report = job["report"]
    assert report["base"]["weights"] == "dense"
    equivalence = report["equivalence"]
    assert equivalence["same_base"]["max_relative_error"] < 1e-4
    assert equivalence["served"]["base"] == "nf4 weights in float32, as served"
    # What is served has NF4's rounding, which the export has not.
    assert equivalence["served"]["max_relative_error"] > 1e-3
