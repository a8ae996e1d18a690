"""What breaks ends its own requests with an error, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_server.core.types import FinishReason, RequestOutput
from manylora_server.engine import engine as engine_module
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.engine.engine import Engine
from manylora_server.model.adapted import AdaptedLinear
from manylora_server.model.batch import Chunk
from manylora_server.model.modules import AdaptedModules
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import build, inner, publish_unchecked, request, run, tokens_of

PROMPT = [10, 20, 30, 40, 50]


@dataclass(frozen=True)
class Folders:
    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("failures")
    base = save_model("llama", root / "base")
    good = save_adapter(base, lora("llama", r=4, target_modules="all-linear"), root / "good", 1)
    huge = root / "huge"
    shutil.copytree(good, huge)
    file = huge / "adapter_model.safetensors"
    # Finite weights whose products overflow.
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    return Folders(root / "base", {"good": good, "huge": huge})


@pytest.fixture
def engine(folders: Folders, tmp_path: Path) -> Iterator[AsyncEngine]:
    # Nobody who is asked would take it in, but a canary prompt cannot foresee every overflow.
    publish_unchecked(tmp_path, folders.base, "huge", folders.adapters["huge"])
    made = build(
        folders.base,
        tmp_path,
        adapters={"good": folders.adapters["good"]},
        kv_block_tokens=4,
        max_batch_tokens=16,
    )
    yield made
    made.close()


class Unreliable:
    """A runner that raises at the calls whose number ``fails`` accepts."""

    def __init__(self, core: Engine, fails: Callable[[int], bool]) -> None:
        self._runner = core._runner
        self._fails = fails
        self.calls = 0
        core._runner = self

    def logits(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.calls += 1
        if self._fails(self.calls):
            # As a real failure would, after some of the work was done.
            self._runner.logits(chunks)
            raise RuntimeError("the device is gone")
        return self._runner.logits(chunks)


def reason(outputs: list[RequestOutput]) -> FinishReason | None:
    return outputs[-1].finish_reason


def assert_clean(core: Engine) -> None:
    core.check_integrity()
    assert not core.has_work
    assert core.scheduler.blocks.used == 0
    slots = core.residency.slots
    assert not any(slots.references(digest) for digest in slots.resident)


def test_a_failed_step_ends_its_requests_and_those_after_it_go_on(engine: AsyncEngine) -> None:
    core = inner(engine)
    good = engine.adapters.resolve("good")
    expected = tokens_of(run(core, {0: [request("alone", PROMPT, good)]})["alone"])
    Unreliable(core, lambda call: call == 3)
    outputs = run(
        core,
        {
            0: [request("a", PROMPT, good), request("b", PROMPT)],
            # It arrives after the failure.
            4: [request("c", PROMPT, good)],
        },
    )
    for lost in ("a", "b"):
        assert reason(outputs[lost]) is FinishReason.ERROR
        assert outputs[lost][-1].error == "the step failed: RuntimeError"
        assert len(tokens_of(outputs[lost])) == 2
    assert reason(outputs["c"]) is FinishReason.LENGTH
    assert tokens_of(outputs["c"]) == expected
    assert_clean(core)


def test_waiting_requests_survive_a_failed_step(engine: AsyncEngine) -> None:
    core = inner(engine)
    Unreliable(core, lambda call: call == 1)
    outputs = run(core, {0: [request(str(i), [3 + i] * 12, max_tokens=2) for i in range(6)]})
    reasons = [reason(outputs[str(i)]) for i in range(6)]
    # Sixteen tokens a step: the first prompt and part of the second were in the one that failed.
    assert reasons == [FinishReason.ERROR] * 2 + [FinishReason.LENGTH] * 4
    assert_clean(core)


def test_every_request_ends_though_every_step_fails(engine: AsyncEngine) -> None:
    core = inner(engine)
    Unreliable(core, lambda call: True)
    outputs = run(core, {0: [request(str(i), PROMPT) for i in range(9)]})
    assert [reason(outputs[str(i)]) for i in range(9)] == [FinishReason.ERROR] * 9
    assert_clean(core)


def test_a_failed_choice_of_tokens_ends_the_step_s_requests(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = inner(engine)
    real = engine_module.sample
    calls = iter(range(100))

    def fail_once(*args: Any) -> Any:
        if next(calls) == 1:
            raise IndexError("no such token")
        return real(*args)

    monkeypatch.setattr(engine_module, "sample", fail_once)
    outputs = run(core, {0: [request("a", PROMPT)], 3: [request("b", PROMPT)]})
    assert outputs["a"][-1].error == "the step failed: IndexError"
    assert reason(outputs["b"]) is FinishReason.LENGTH
    assert_clean(core)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("others", [1, 80], ids=["dense deltas", "looped deltas"])
def test_an_adapter_that_overflows_fails_only_its_own_request(
    engine: AsyncEngine, others: int, temperature: float
) -> None:
    core = inner(engine)
    good, huge = engine.adapters.resolve("good"), engine.adapters.resolve("huge")
    core.scheduler._max_batch_tokens = 512
    settings = {"temperature": temperature, "seed": 5, "max_tokens": 6}
    prompts = {f"good {i}": [*PROMPT, 5 + i] for i in range(min(others, 3))}
    prompts = {name: prompt * max(1, others // 6) for name, prompt in prompts.items()}
    expected = {}
    for name, prompt in prompts.items():
        alone = run(core, {0: [request(name, prompt, good, **settings)]})
        expected[name] = tokens_of(alone[name])
    mixed = [request(name, prompt, good, **settings) for name, prompt in prompts.items()]
    mixed.insert(1, request("huge", PROMPT, huge, **settings))
    mixed.append(request("base", PROMPT, **settings))
    outputs = run(core, {0: mixed, 2: [request("huge again", PROMPT, huge, **settings)]})
    for bad in ("huge", "huge again"):
        assert reason(outputs[bad]) is FinishReason.ERROR
        assert "not finite" in (outputs[bad][-1].error or "")
        assert tokens_of(outputs[bad]) == []
    for name, tokens in expected.items():
        assert tokens_of(outputs[name]) == tokens
    assert reason(outputs["base"]) is FinishReason.LENGTH
    assert_clean(core)
    # What it left in its blocks harms nobody who gets them next.
    for name, prompt in prompts.items():
        again = run(core, {0: [request(name, prompt, good, **settings)]})
        assert tokens_of(again[name]) == expected[name]


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError, ValueError, OSError])
def test_an_adapter_that_cannot_be_loaded(
    engine: AsyncEngine, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = inner(engine)
    good, huge = engine.adapters.resolve("good"), engine.adapters.resolve("huge")
    host = core.residency.host
    load = host._load
    broken = True

    def refuse(digest: str) -> Any:
        if broken and digest == huge.digest:
            raise error("it is broken")
        return load(digest)

    monkeypatch.setattr(host, "_load", refuse)
    outputs = run(
        core,
        {0: [request("bad", PROMPT, huge), request("fine", PROMPT, good), request("b", PROMPT)]},
    )
    assert reason(outputs["bad"]) is FinishReason.ERROR
    assert "could not be loaded" in (outputs["bad"][-1].error or "")
    assert reason(outputs["fine"]) is FinishReason.LENGTH
    assert reason(outputs["b"]) is FinishReason.LENGTH
    assert huge.digest not in core.residency.on_device
    broken = False
    again = run(core, {0: [request("later", PROMPT, huge)]})["later"][-1]
    assert "not finite" in (again.error or ""), "it was not loaded once it could be"
    assert_clean(core)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_an_adapter_that_cannot_be_copied_to_the_device(
    engine: AsyncEngine, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = inner(engine)
    good, huge = engine.adapters.resolve("good"), engine.adapters.resolve("huge")
    fill = AdaptedLinear.fill
    calls = iter(range(1000))

    def refuse(self: AdaptedLinear, slot: int, patch: Any) -> None:
        if next(calls) == 3:
            raise error("out of memory")
        fill(self, slot, patch)

    monkeypatch.setattr(AdaptedLinear, "fill", refuse)
    outputs = run(core, {0: [request("bad", PROMPT, huge)], 2: [request("b", PROMPT)]})
    assert "could not be loaded" in (outputs["bad"][-1].error or "")
    assert reason(outputs["b"]) is FinishReason.LENGTH
    modules = core.residency.slots._modules
    assert isinstance(modules, AdaptedModules)
    assert modules.resident_bytes() == 0
    assert not any(module.slots for module in modules._wrapped.values())
    outputs = run(core, {0: [request("fine", PROMPT, good)]})
    assert reason(outputs["fine"]) is FinishReason.LENGTH
    assert_clean(core)


def test_fail_all_ends_everything(engine: AsyncEngine) -> None:
    core = inner(engine)
    for i in range(4):
        core.add(request(str(i), PROMPT * 3, engine.adapters.resolve("good")))
    core.step()
    outputs = core.fail_all("gone")
    assert {o.request_id for o in outputs} == {"0", "1", "2", "3"}
    assert all(o.finish_reason is FinishReason.ERROR and o.error == "gone" for o in outputs)
    assert core.step() == []
    assert_clean(core)
