"""Receipts of adapters that are right: every architecture, every feature, every precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_kernels import native, select_backend
from support.adapters import adalora, attention_targets, lora
from support.models import ARCHITECTURES
from support.oracle import Oracle
from support.receipts import MeasuredBase

LARGEST_ERROR = 1e-4


def kinds(architecture: str) -> dict[str, Any]:
    targets = attention_targets(architecture)
    # On mixtures of experts PEFT's "all-linear" also wraps the experts' 3-d parameters.
    mixture = architecture in {"mixtral", "qwen3_moe"}
    wide = [*targets, "k_proj", "o_proj"] if mixture else "all-linear"
    return {
        "rslora": lora(architecture, r=8, use_rslora=True, target_modules=wide),
        "dora": lora(architecture, r=3, use_dora=True, target_modules=wide),
        "adalora": adalora(architecture),
        "patterns": lora(
            architecture,
            r=2,
            rank_pattern={targets[0]: 5},
            alpha_pattern={targets[0]: 3},
            layers_to_transform=[1],
        ),
        "biases": lora(architecture, bias="all"),
    }


def features(architecture: str) -> dict[str, Any]:
    targets = attention_targets(architecture)
    gpt2 = architecture == "gpt2"
    embedding = "wte" if gpt2 else "embed_tokens"
    norm = {"gpt2": "ln_f", "phi": "final_layernorm"}.get(architecture, "norm")
    found: dict[str, Any] = {
        "embeddings": lora(architecture, target_modules=[embedding, *targets]),
        "head": lora(architecture, target_modules=["lm_head", *targets]),
        "saved-head": lora(architecture, modules_to_save=["lm_head"]),
        "saved-embeddings": lora(architecture, modules_to_save=[embedding]),
        "saved-norm": lora(architecture, modules_to_save=[norm]),
        "saved-linear": lora(architecture, modules_to_save=["c_fc" if gpt2 else "k_proj"]),
        "lora-bias": lora(architecture, lora_bias=True),
        "own-biases": lora(architecture, bias="lora_only"),
    }
    if not gpt2:
        found["dora-embeddings"] = lora(
            architecture, target_modules=[embedding, *targets], use_dora=True
        )
    if ARCHITECTURES[architecture].get("tie_word_embeddings"):
        found["tied-targets"] = lora(
            architecture, target_modules=[embedding, *targets], ensure_weight_tying=True
        )
        found["tied-saved"] = lora(
            architecture, modules_to_save=[embedding], ensure_weight_tying=True
        )
    return found


def check(base: MeasuredBase, adapters: dict[str, Any]) -> None:
    for seed, (name, config) in enumerate(adapters.items()):
        receipt = base.measure(base.adapter(name, config, seed))
        assert receipt.largest_relative_logit_error < LARGEST_ERROR, (name, receipt)
        assert receipt.effect > 0.01, (name, receipt)
        assert receipt.top_token_agreement == 1.0, (name, receipt)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture(architecture: str, quantization: str, tmp_path: Path) -> None:
    check(MeasuredBase(architecture, tmp_path, quantization), kinds(architecture))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "phi"])
def test_every_feature(architecture: str, quantization: str, tmp_path: Path) -> None:
    adapters = features(architecture)
    if architecture == "gpt2" and quantization == "nf4":
        # Saved from a Conv1D, which a 4-bit layer is not any more.
        del adapters["saved-linear"]
    check(MeasuredBase(architecture, tmp_path, quantization), adapters)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_every_feature_on_a_checkpoint_of_16_bits(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    adapters = features(architecture)
    if architecture == "gpt2" and quantization == "nf4":
        del adapters["saved-linear"]
    if native.missing is None:
        select_backend("half_linear", native.NATIVE)
    try:
        check(MeasuredBase(architecture, tmp_path, quantization, stored=torch.bfloat16), adapters)
    finally:
        select_backend("half_linear", "reference")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mixtral"])
def test_sixteen_bits(architecture: str, dtype: str, quantization: str, tmp_path: Path) -> None:
    base = MeasuredBase(architecture, tmp_path, quantization, dtype)
    for seed, (name, config) in enumerate(kinds(architecture).items()):
        receipt = base.measure(base.adapter(name, config, seed))
        assert receipt.relative_logit_error < 3e-2, (name, receipt)
        assert receipt.dtype == dtype


def test_what_a_receipt_says(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path, "nf4")
    told = json.loads(json.dumps(base.measure(base.adapter("a", lora("llama"))).as_dict()))
    assert told.pop("prompts") == 3
    assert told.pop("tokens") == 48
    assert told.pop("positions") == 24
    assert told.pop("quantization") == "nf4"
    assert told.pop("dtype") == "float32"
    assert told.pop("peft_version") == peft.__version__
    assert told.pop("threshold") == 1e-3
    assert told.pop("top_token_agreement") == 1.0
    assert 0 < told.pop("max_abs_logit_error") < 1e-3
    largest = told.pop("largest_relative_logit_error")
    assert 0 < told.pop("relative_logit_error") < largest < LARGEST_ERROR
    assert 0 <= told.pop("kl_divergence") < 1e-6
    assert told.pop("effect") > 0.1
    assert told.pop("measured_at") > 1.7e9
    assert told.pop("seconds") > 0
    assert told == {}


def test_the_numbers_are_those_of_two_separate_models(tmp_path: Path) -> None:
    """The receipt's ``effect`` against transformers and PEFT loaded on their own."""
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    oracle = Oracle(tmp_path / "base", "none", {"a": folder})
    ids = torch.tensor(base.meter.prompts)
    with torch.inference_mode():
        plain, changed = (oracle.model(name)(ids).logits for name in (None, "a"))
    positions = [4, 5, 6, 7, 10, 11, 12, 15]
    scale = (changed.amax(-1) - changed.amin(-1))[:, positions]
    effect = ((changed - plain).abs().amax(-1)[:, positions] / scale).median()
    assert base.measure(folder).effect == pytest.approx(float(effect), rel=1e-3)


def test_an_adapter_without_effect_shows(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    path = folder / "adapter_model.safetensors"
    tensors = {n: t * (0 if "lora_B" in n else 1) for n, t in load_file(path).items()}
    save_file(tensors, path)
    receipt = base.measure(folder)
    assert receipt.effect < 1e-5
    assert receipt.largest_relative_logit_error < 1e-5


def test_it_is_run_as_a_language_model_whatever_it_was_trained_for(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    expected = base.measure(folder).effect
    path = folder / "adapter_config.json"
    for task in ("SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None):
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": task}))
        assert base.measure(folder).effect == expected
