"""Twins on a real engine: made, chosen and dropped while requests run."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora_kernels import select_backend, selected_backend
from manylora_server.adapters.twins.job import MergeOrder
from manylora_server.adapters.twins.policy import AutoMerge, PolicySettings
from manylora_server.adapters.twins.step_times import PathChoice
from manylora_server.core.errors import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterRefusedError,
    EngineFailureError,
    ManyloraError,
    NotReadyError,
    OverloadedError,
)
from manylora_server.core.types import FinishReason
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.model.experts import NF4Experts
from manylora_server.model.half_linear import HalfModule
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.twin.exact import check_mergeable
from manylora_store.compiler.canonical import CompiledAdapter, ModulePatch
from manylora_store.errors import AdapterUnsupportedError
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import Recorder, bring_in, build, inner, merge, request, run, tokens_of

PROMPT = [5, 60, 7, 200, 31, 8]
ADAPTERS = {"one": 4, "two": 3, "three": 2}


@pytest.fixture
def twins_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use twins wherever they can be, however long they take."""
    monkeypatch.setattr(PathChoice, "merged_is_faster", lambda self, tokens: True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    base = save_model("llama", folder / "base")
    for seed, (name, rank) in enumerate(ADAPTERS.items()):
        save_adapter(base, lora("llama", r=rank), folder / name, seed)
    quiet = save_adapter(base, lora("llama"), folder / "quiet", 9)
    _quieten(quiet)
    return folder


def _quieten(folder: Path) -> None:
    """Make an adapter's change of the weights a hundredth of what it was."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v * 0.02 if "lora_B" in k else v for k, v in tensors.items()}, path)


@pytest.fixture
def make(files: Path, tmp_path: Path) -> Callable[..., AsyncEngine]:
    def maker(*names: str, **options: Any) -> AsyncEngine:
        adapters = {name: files / name for name in names or ADAPTERS}
        return build(files / "base", tmp_path / "home", adapters=adapters, **options)

    return maker


def digest(engine: AsyncEngine, name: str) -> str:
    return engine.adapters.resolve(name).digest


def failure(engine: AsyncEngine, name: str, precision: Any = "bf16", **more: Any) -> ManyloraError:
    with pytest.raises(ManyloraError) as caught:
        merge(engine, name, precision, **more)
    assert not inner(engine).twins.busy
    assert not inner(engine).residency._held
    return caught.value


def packed_bytes(engine: AsyncEngine) -> str:
    """Hash all of the base's weights as they lie in memory."""
    found = hashlib.sha256()
    view = inner(engine).twins._base.view._template
    for name, module in view.named_modules():
        tensors: list[torch.Tensor] = list(module.parameters(recurse=False))
        if isinstance(module, NF4Linear):
            tensors += module.weight_nf4.tensors
        elif isinstance(module, NF4Experts):
            tensors += [t for weight in (*module.gate_up, *module.down) for t in weight.tensors]
        elif isinstance(module, HalfModule):
            tensors.append(module.weight_half.tiles)
        for tensor in tensors:
            found.update(name.encode())
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def alone(engine: AsyncEngine, name: str | None, tokens: int = 24) -> list[int]:
    choice = None if name is None else engine.adapters.resolve(name)
    asked = request("alone", PROMPT, choice, max_tokens=tokens)
    return tokens_of(run(inner(engine), {0: [asked]})["alone"])


def test_a_hundred_merges_leave_the_base_as_it_was(make: Any, twins_win: None) -> None:
    engine = make(quantization="nf4")
    core = inner(engine)
    before = packed_bytes(engine)
    expected = {name: alone(engine, name) for name in (None, *ADAPTERS)}
    for number in range(100):
        name = list(ADAPTERS)[number % 3]
        merge(engine, name, ("bf16", "int8", "nf4")[number // 3 % 3], force=True)
        if number % 10 == 0:
            alone(engine, name)
        assert core.twins.drop(digest(engine, name))
    assert packed_bytes(engine) == before
    assert {name: alone(engine, name) for name in (None, *ADAPTERS)} == expected
    assert core.twins.bytes == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_requests_go_on_while_adapters_are_merged_and_unmerged(
    make: Any, twins_win: None, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Every answer is the adapter's own, whichever path its steps took, and none fails."""
    from manylora_server.model.twin import storage

    # In float32 a twin's greedy tokens are the adapter's.
    monkeypatch.setattr(storage, "_widens", lambda: False)
    # So little that merging takes many steps.
    monkeypatch.setattr("manylora_server.model.twin.pace.Pace.begin", lambda self, idle: 0.0)
    monkeypatch.setattr("manylora_server.adapters.twins.trial._TIMED_TOKENS", (1, 4))
    engine = make(quantization=quantization, max_batch_tokens=16)
    core = inner(engine)
    names = [None, *ADAPTERS]
    expected = {name: alone(engine, name) for name in names}
    recorder = Recorder(core)
    futures = []

    def each_step(step: int) -> None:
        if step == 3:
            futures.append(core.twins.merge(MergeOrder(digest(engine, "one"), "bf16")))
        if step == 20:
            futures.append(core.twins.merge(MergeOrder(digest(engine, "two"), "bf16")))
        if step % 200 == 199 and step < 800:
            core.twins.drop(digest(engine, "one"))
            futures.append(core.twins.merge(MergeOrder(digest(engine, "one"), "bf16")))

    arrivals: dict[int, list[Any]] = {}
    for number in range(40):
        # Alone at times, so that there are steps for a twin, and in company at others.
        name = "one" if number % 2 else names[number // 2 % len(names)]
        choice = None if name is None else engine.adapters.resolve(name)
        asked = request(f"{name}/{number}", PROMPT, choice, max_tokens=24)
        arrivals.setdefault(25 * number, []).append(asked)
    outputs = run(core, arrivals, each_step)
    for request_id, got in outputs.items():
        name = request_id.split("/")[0]
        assert got[-1].finish_reason is FinishReason.LENGTH
        assert tokens_of(got) == expected[None if name == "None" else name], request_id
    assert len(outputs) == 40
    assert all(future.done() for future in futures)
    assert 0 < recorder.merged_steps < len(recorder.steps)
    assert core.twins.merged_steps == recorder.merged_steps


def test_only_steps_of_the_merged_adapter_alone_use_its_twin(make: Any, twins_win: None) -> None:
    engine = make()
    core = inner(engine)
    merge(engine, "one")
    bring_in(engine)
    recorder = Recorder(core)
    one, two = engine.adapters.resolve("one"), engine.adapters.resolve("two")
    run(core, {0: [request("a", PROMPT, one, max_tokens=4), request("b", PROMPT, two)]})
    # The prompt and three tokens in company, or of the other's alone.
    assert recorder.merged_steps == 0
    run(core, {0: [request("c", PROMPT, one, max_tokens=4), request("d", PROMPT, one)]})
    assert recorder.merged_steps == 8
    run(core, {0: [request("e", PROMPT, None)]})
    assert recorder.merged_steps == 8


def test_the_slower_path_is_not_taken(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    core = inner(engine)
    merge(engine, "one")
    monkeypatch.setattr(PathChoice, "merged_is_faster", lambda self, tokens: tokens > 1)
    one = engine.adapters.resolve("one")
    run(core, {0: [request("a", PROMPT, one, max_tokens=4)]})
    assert (core.twins.merged_steps, core.twins.fused_steps) == (1, 3)


def test_dropping_a_twin_frees_it(make: Any) -> None:
    engine = make(quantization="nf4")
    core = inner(engine)
    for precision in ("bf16", "int8", "nf4"):
        merge(engine, "one", precision, force=True)
        program = core.twins._twins[digest(engine, "one")].runner.program
        assert program is not None
        held = [weakref.ref(program), *map(weakref.ref, _own_tensors(program))]
        assert len(held) > 4
        del program
        assert core.twins.drop(digest(engine, "one"))
        freed = core.twins.freed()
        while core.twins.busy:
            core.step()
        assert freed.done()
        assert core.twins.bytes == 0
        gc.collect()
        assert [ref() for ref in held if ref() is not None] == []
    assert not core.twins.drop(digest(engine, "one"))


def _own_tensors(program: Any) -> Iterator[torch.Tensor]:
    """Yield the weights of the exchanged modules."""
    for kept in program._lowering.kept:
        for tensor in kept if isinstance(kept, list) else [kept]:
            if isinstance(tensor, torch.Tensor):
                yield tensor
    for event in program._foreign.values():
        if "int8_linear" in str(event.target):
            yield event.args[1].tensor


def test_nobody_goes_on_from_what_a_dropped_twin_computed(make: Any, twins_win: None) -> None:
    engine = make()
    core = inner(engine)
    one = engine.adapters.resolve("one")
    prompt = [7 + 3 * index for index in range(40)]

    def cached(name: str) -> int:
        return run(core, {0: [request(name, prompt, one)]})[name][-1].cached_tokens

    merge(engine, "one", "nf4", force=True)
    assert (cached("merged"), cached("again") > 0) == (0, True)
    assert core.twins.drop(one.digest)
    assert (cached("unmerged"), cached("once more") > 0) == (0, True)
    merge(engine, "one", "int8")
    assert cached("the base's own keys and values serve a twin as well") > 0
    merge(engine, "one", "bf16")
    assert cached("another twin in its place") == 0


def test_an_nf4_twin_that_loses_the_adapter_is_refused(make: Any) -> None:
    engine = make("quiet", "one", quantization="nf4")
    error = failure(engine, "quiet", "nf4")
    assert isinstance(error, AdapterRefusedError)
    assert (error.code, error.param) == ("adapter_unsupported", "precision")
    assert "would survive" in error.message
    forced = merge(engine, "quiet", "nf4", force=True)
    assert forced.forced
    assert forced.delta_share < 0.9
    for precision in ("bf16", "int8"):
        record = merge(engine, "quiet", precision)
        assert not record.forced
        assert record.delta_share == pytest.approx(1, abs=0.05)
        assert record.error.kl_divergence < forced.error.kl_divergence
    assert not merge(engine, "one", "nf4").forced


def test_memory_for_twins_is_bounded(make: Any) -> None:
    engine = make(merge_bytes=25_000)
    core = inner(engine)
    assert merge(engine, "one").bytes == 24_576
    error = failure(engine, "two")
    assert isinstance(error, AdapterConflictError)
    assert "--merge-memory" in error.message
    core.twins.drop(digest(engine, "one"))
    merge(engine, "two", "int8")
    assert core.twins.bytes == core.twins.stats()["bytes"] < 25_000


def test_asked_for_again(make: Any) -> None:
    engine = make()
    core = inner(engine)
    first = merge(engine, "one")
    assert merge(engine, "one") is first
    other = merge(engine, "one", "int8")
    assert other.precision == "int8"
    assert list(core.twins.records) == [digest(engine, "one")]
    automatic = merge(engine, "two", automatic=True)
    assert automatic.automatic
    assert not merge(engine, "two").automatic
    assert not core.twins.records[digest(engine, "two")].automatic


def test_two_wishes_for_one_adapter(make: Any) -> None:
    engine = make()
    core = inner(engine)
    order = MergeOrder(digest(engine, "one"), "bf16")
    first, second = core.twins.merge(order), core.twins.merge(order)
    contrary = core.twins.merge(MergeOrder(digest(engine, "one"), "int8"))
    assert isinstance(contrary.exception(), AdapterConflictError)
    merge(engine, "two")
    assert first.result() is second.result()


def test_a_merge_can_be_called_off_at_any_point(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora_server.model.twin.pace.Pace.begin", lambda self, idle: 0.0)
    engine = make(quantization="nf4")
    core = inner(engine)
    expected = alone(engine, "one")
    for pieces in (0, 1, 2, 5, 9, 14, 40, 90):
        future = core.twins.merge(MergeOrder(digest(engine, "one"), "bf16"))
        for _ in range(pieces):
            core.step()
            if core.stalled:
                core.residency.host.wait(60)
        assert not future.done()
        assert core.twins.drop(digest(engine, "one"))
        assert isinstance(future.exception(), AdapterConflictError)
        assert not core.residency._held
        assert core.twins.bytes == 0
        assert not core.has_work
        assert alone(engine, "one") == expected


def test_the_adapter_keeps_its_slot_while_it_is_merged(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora_server.model.twin.pace.Pace.begin", lambda self, idle: 0.0)
    engine = make(adapter_slots=2)
    core = inner(engine)
    future = core.twins.merge(MergeOrder(digest(engine, "one"), "bf16"))
    names = [name for name in ("two", "three") for _ in range(4)]
    arrivals = {
        7 * number: [request(str(number), PROMPT, engine.adapters.resolve(name))]
        for number, name in enumerate(names)
    }

    def still_there(step: int) -> None:
        if step > 10 and not future.done():
            assert digest(engine, "one") in core.residency.on_device

    run(core, arrivals, still_there)
    assert future.result().precision == "bf16"


def test_a_load_that_fails(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()

    def broken(digest: str) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(inner(engine).residency.host, "_load", broken)
    error = failure(engine, "one")
    assert isinstance(error, AdapterLoadError)
    assert "the disk is gone" in error.message


def test_a_failure_of_ours_ends_the_merge_and_nothing_else(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    expected = alone(engine, "one")

    def broken(*_: Any) -> Any:
        raise RuntimeError("not our day")

    monkeypatch.setattr("manylora_server.adapters.twins.job.build_modules", broken)
    assert isinstance(failure(engine, "one"), EngineFailureError)
    assert "not our day" in caplog.text
    assert alone(engine, "one") == expected


def test_a_twin_that_is_wired_wrongly_is_not_used(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manylora_server.model.twin.exact import ExactModule

    engine = make()
    right = ExactModule.merged_rows
    monkeypatch.setattr(
        ExactModule, "merged_rows", lambda self, a, b, base: -right(self, a, b, base)
    )
    error = failure(engine, "one")
    assert isinstance(error, EngineFailureError)
    assert "is not used" in error.message
    assert not inner(engine).twins.records


def test_rounded_activations_do_not_hide_what_the_twin_is(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("one", quantization="nf4")
    monkeypatch.setattr("manylora_server.model.twin.storage._widens", lambda: False)
    before = selected_backend("nf4_linear")
    select_backend("nf4_linear", "reference-int8")
    try:
        record = merge(engine, "one")
    finally:
        select_backend("nf4_linear", before)
    assert record.storage == "float32"
    assert record.error.largest_relative_logit_error < 1e-4


@dataclass(frozen=True)
class _Rotated(ModulePatch):
    rotation: torch.Tensor | None = None


@dataclass(frozen=True)
class _Prompted(CompiledAdapter):
    virtual_tokens: tuple[int, ...] = ()


def test_what_is_more_than_weights_is_refused_by_name(make: Any) -> None:
    engine = make("one")
    layout = inner(engine).twins._base.loaded.layout
    record = engine.adapters.get("one")
    assert record is not None
    name = "model.layers.0.self_attn.q_proj"
    check_mergeable(_Prompted(record, {name: _Rotated()}), layout)
    with pytest.raises(AdapterUnsupportedError, match=r"rotation of module 'model\.layers\.0"):
        check_mergeable(CompiledAdapter(record, {name: _Rotated(rotation=torch.ones(1))}), layout)
    with pytest.raises(AdapterUnsupportedError, match="virtual tokens"):
        check_mergeable(_Prompted(record, {}, virtual_tokens=(1,)), layout)


def test_the_server_ends_while_it_merges(make: Any) -> None:
    engine = make()
    twins = inner(engine).twins
    futures = [twins.merge(MergeOrder(digest(engine, name), "bf16")) for name in ("one", "two")]
    inner(engine).step()
    twins.refuse_all(NotReadyError("the server is shutting down."))
    assert all(isinstance(future.exception(), NotReadyError) for future in futures)
    assert not inner(engine).has_work


def test_the_slots_are_all_taken(make: Any) -> None:
    engine = make("one", "two", adapter_slots=1)
    core = inner(engine)
    core.add(request("long", PROMPT, engine.adapters.resolve("one"), max_tokens=10_000))
    while core.scheduler.waiting:
        core.step()
        core.residency.host.wait(60)
    future = core.twins.merge(MergeOrder(digest(engine, "two"), "bf16"))
    while not future.done():
        core.step()
    assert isinstance(future.exception(), OverloadedError)
    core.abort("long")


def test_automatic_merging_follows_the_traffic(make: Any) -> None:
    engine = make()
    core = inner(engine)
    told: list[str] = []
    core.twins._observer.on_auto_merge = told.append  # type: ignore[method-assign]
    clock = iter(range(1_000_000))
    # A second passes whenever the policy looks; any traffic pays, until there is none.
    settings = PolicySettings(
        every_s=3, window_s=30, promote_s=1e-9, demote_s=1e-12, patience=2, residence_s=5
    )
    core.twins._policy = policy = AutoMerge(settings, lambda: float(next(clock)))
    one = engine.adapters.resolve("one")
    arrivals = {40 * n: [request(f"r{n}", PROMPT, one, max_tokens=30)] for n in range(8)}
    outputs = run(core, arrivals)
    assert all(got[-1].finish_reason is FinishReason.LENGTH for got in outputs.values())
    assert told == ["promote"]
    record = core.twins.records[one.digest]
    assert record.automatic
    assert record.precision == "bf16"
    assert core.twins.stats()["automatic"]["last_decision"]["action"] == "promote"
    run(core, {40 * n: [request(f"b{n}", PROMPT, None, max_tokens=30)] for n in range(8)})
    assert told[:2] == ["promote", "demote"]
    assert not core.twins.records
    assert policy.last is not None
    assert "saves 0.00 s a minute" in policy.last.reason


def test_without_a_program_a_tree_is_used(make: Any, twins_win: None) -> None:
    engine = make(quantization="nf4")
    core = inner(engine)
    core._runner.program = None  # type: ignore[attr-defined]
    expected = alone(engine, "one")
    record = merge(engine, "one")
    assert not record.replayed
    assert list(record.choice.fused.tokens) == [1, 4, 16]
    recorder = Recorder(core)
    assert alone(engine, "one")[:4] == expected[:4]
    assert recorder.merged_steps == len(recorder.steps)


def test_what_twins_hold_is_told(make: Any) -> None:
    engine = make()
    core = inner(engine)
    told: list[tuple[int, int]] = []
    core.twins._observer.on_twins = lambda *numbers: told.append(numbers)  # type: ignore[method-assign]
    merge(engine, "one")
    merge(engine, "two", "int8")
    core.twins.drop(digest(engine, "one"))
    assert [count for count, _ in told] == [1, 2, 1]
    assert told[1][1] == told[0][1] + told[2][1]
    stats = core.twins.stats()
    assert list(stats["twins"]) == [digest(engine, "two")]
    assert stats["bytes_limit"] == core.twins.max_bytes
