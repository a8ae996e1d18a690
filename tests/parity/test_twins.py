"""Merged adapters against PEFT's merge_and_unload, and against the adapters they were made of."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from manylora_server.adapters.twins.step_times import PathChoice
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.model.twin import storage
from support.adapters import adalora, attention_targets, lora, save_adapter, train_biases
from support.models import ARCHITECTURES, save_model
from support.oracle import greedy, load_base
from support.serving import Recorder, build, inner, merge, request, run, tokens_of

NEW_TOKENS = 6
PROMPTS = ([5, 60, 7, 200, 31], [9, 9, 100, 101, 102, 103, 104, 105, 40, 41, 42])


@pytest.fixture(autouse=True)
def twins_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use twins wherever they can be, however long they take."""
    monkeypatch.setattr(PathChoice, "merged_is_faster", lambda self, tokens: True)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep ``bf16`` twins as they are kept where no kernels are for 16 bits."""
    monkeypatch.setattr(storage, "_widens", lambda: False)


def kinds(architecture: str) -> dict[str, Any]:
    """Adapters of every kind that the base can have."""
    targets = attention_targets(architecture)
    gpt2 = architecture == "gpt2"
    embedding = "wte" if gpt2 else "embed_tokens"
    norm = "ln_f" if gpt2 else "norm"
    found: dict[str, Any] = {
        "lora": lora(architecture),
        "rslora": lora(architecture, r=9, use_rslora=True),
        "dora": lora(architecture, r=3, use_dora=True),
        "adalora": adalora(architecture),
        "embeddings": lora(architecture, target_modules=[embedding, *targets]),
        "head": lora(architecture, r=5, target_modules=["lm_head", *targets]),
        "saved-head": lora(architecture, modules_to_save=["lm_head"]),
        "saved-embeddings": lora(architecture, modules_to_save=[embedding]),
        "saved-norm": lora(architecture, modules_to_save=[norm]),
        "lora-bias": lora(architecture, lora_bias=True),
        "all-linear": lora(architecture, target_modules="all-linear"),
    }
    if architecture in {"qwen2", "gpt2"}:
        found["biases"] = lora(architecture, bias="all")
        found["own-biases"] = lora(architecture, bias="lora_only")
    return found


def logits_of(engine: AsyncEngine, name: str, *, merged: bool) -> torch.Tensor:
    """Return the logits behind each token of each prompt, and check which path they came by."""
    core = inner(engine)
    choose, runner = core.twins.runner_for, core._runner
    recorder = Recorder(core)
    asked = [
        request(str(index), prompt, engine.adapters.resolve(name), max_tokens=NEW_TOKENS)
        for index, prompt in enumerate(PROMPTS)
    ]
    outputs = run(core, {0: asked})
    core.twins.runner_for, core._runner = choose, runner  # type: ignore[method-assign]
    assert recorder.merged_steps == (len(recorder.steps) if merged else 0)
    rows = [torch.stack(recorder.rows[str(index)]) for index in range(len(PROMPTS))]
    for index, row in enumerate(rows):
        assert row.argmax(1).tolist() == tokens_of(outputs[str(index)])
    return torch.cat(rows)


# Which of the kinds PEFT cannot merge, or merges into a weight that another module shares.
PEFT_KEEPS_APART = {
    "llama": {"lora-bias"},
    "qwen2": {"embeddings", "head", "lora-bias"},
    "gemma3_text": {"embeddings", "head", "lora-bias"},
    "gpt2": {"embeddings", "head"},
}


def by_peft(folder: Path, adapter: Path, *, merged: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load_base(folder, "none"), adapter).eval()
        if merged:
            model = model.merge_and_unload().eval()
    return torch.cat([greedy(model, prompt, NEW_TOKENS)[1] for prompt in PROMPTS])


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_a_merged_adapter_is_what_peft_merges(
    architecture: str, in_float32: None, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    base = save_model(architecture, folder)
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(kinds(architecture).items())
    }
    for adapter in adapters.values():
        train_biases(adapter)
    engine = build(folder, tmp_path / "home", adapters=adapters)
    for name, adapter in adapters.items():
        record = merge(engine, name)
        assert record.storage == "float32"
        assert record.delta_share == pytest.approx(1, abs=1e-3), name
        got = logits_of(engine, name, merged=True)
        merged = name not in PEFT_KEEPS_APART[architecture]
        expected = by_peft(folder, adapter, merged=merged)
        assert got.argmax(1).tolist() == expected.argmax(1).tolist(), name
        assert error(got, expected) < 1e-4, name
        assert inner(engine).twins.drop(engine.adapters.resolve(name).digest)
        again = logits_of(engine, name, merged=False)
        assert error(again, expected) < 1e-4, name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_twin_answers_as_the_adapter_does(
    architecture: str, quantization: str, in_float32: None, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    base = save_model(architecture, folder)
    config = lora(architecture, use_dora=architecture == "llama")
    adapters = {"it": save_adapter(base, config, tmp_path / "it", 3)}
    engine = build(folder, tmp_path / "home", quantization=quantization, adapters=adapters)
    before = logits_of(engine, "it", merged=False)
    record = merge(engine, "it")
    assert record.error.largest_relative_logit_error < 1e-4
    after = logits_of(engine, "it", merged=True)
    assert after.argmax(1).tolist() == before.argmax(1).tolist()
    assert error(after, before) < 1e-4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("precision", "most"), [("bf16", 4e-2), ("int8", 0.2), ("nf4", 1.5)], ids=lambda v: str(v)
)
def test_precisions(
    architecture: str, quantization: str, precision: str, most: float, tmp_path: Path
) -> None:
    """All kinds of modules at once, in every precision."""
    folder = tmp_path / "base"
    base = save_model(architecture, folder, stored=torch.bfloat16)
    gpt2 = architecture == "gpt2"
    embedding, norm = ("wte", "ln_f") if gpt2 else ("embed_tokens", "norm")
    config = lora(
        architecture,
        target_modules=[embedding, *attention_targets(architecture), "lm_head"],
        modules_to_save=[norm],
    )
    adapters = {"it": save_adapter(base, config, tmp_path / "it", 3)}
    engine = build(folder, tmp_path / "home", quantization=quantization, adapters=adapters)
    before = logits_of(engine, "it", merged=False)
    record = merge(engine, "it", precision, force=True)
    after = logits_of(engine, "it", merged=True)
    assert 0 < error(after[:1], before[:1]) < most
    assert record.error.kl_divergence > 0
    wider = {"bf16": 4, "int8": 2, "nf4": 1}[precision]
    assert record.delta_share == pytest.approx(1, abs=0.2 / wider**2)
