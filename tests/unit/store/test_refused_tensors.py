"""Tensors that do not fit: the class of the error, and that it names the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import (
    AdapterError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterUnsupportedError,
)
from unit.store.store_support import (
    edit_config,
    edit_tensors,
    refuse,
    save_adapter,
)
from unit.store.tiny_models import build_base, layout_of

Tensors = dict[str, torch.Tensor]

Q = "base_model.model.model.layers.0.self_attn.q_proj"
BASE = build_base("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(BASE, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


A = f"{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("new", "error"),
    [
        (
            "base_model.model.model.layers.40.self_attn.q_proj.lora_A.weight",
            AdapterIncompatibleError,
        ),
        ("base_model.model.score.weight", AdapterIncompatibleError),
        ("base_model.model.loose", AdapterIncompatibleError),
        (f"{Q}.lora_diag", AdapterUnsupportedError),
        (f"{Q}.lora_A.other.weight", AdapterUnsupportedError),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", AdapterUnsupportedError),
        ("prompt_embeddings", AdapterUnsupportedError),
        (f"{Q}.lora_A", AdapterInvalidError),
        (f"{Q}.lora_E", AdapterInvalidError),
        (f"{Q}.lora_B.bias", AdapterInvalidError),
        (f"{Q}.lora_magnitude_vector", AdapterInvalidError),
        (f"{Q}.lora_embedding_A", AdapterInvalidError),
        (f"{Q}.base_layer.weight", AdapterInvalidError),
        (f"{Q}.weight", AdapterInvalidError),
        (f"{Q}.bias", AdapterInvalidError),
        (f"{Q}.running_mean", AdapterUnsupportedError),
        (f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight", AdapterInvalidError),
        (f"{Q.replace('q_proj', 'k_proj')}.base_layer.bias", AdapterInvalidError),
        ("base_model.model.lm_head.modules_to_save.weight", AdapterInvalidError),
        ("base_model.model.lm_head.bias", AdapterIncompatibleError),
    ],
)
def test_tensors_without_a_place(folder: Path, new: str, error: type[AdapterError]) -> None:
    edit_tensors(folder, rename(A, new))
    refuse(folder, BASE, error, new)


def test_tensor_given_twice(folder: Path) -> None:
    twin = f"{Q}.lora_A.default.weight"
    edit_tensors(folder, lambda tensors: tensors.update({twin: tensors[A].clone()}))
    refuse(folder, BASE, AdapterInvalidError, A, twin)


def test_missing_tensor_of_a_target(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(A))
    refuse(folder, BASE, AdapterInvalidError, A)


def test_missing_tensor_of_a_replaced_module(folder: Path) -> None:
    edit_config(folder, modules_to_save=["lm_head"])
    refuse(folder, BASE, AdapterInvalidError, "base_model.model.lm_head.weight")


@pytest.mark.parametrize(
    ("shape", "error", "names"),
    [
        ((4, 32), AdapterIncompatibleError, ("[4, 32]", "[4, 16]")),
        ((2, 16), AdapterInvalidError, ("[2, 16]", "rank 2", "rank 4")),
        ((64,), AdapterIncompatibleError, ("[64]", "[4, 16]")),
    ],
)
def test_shape_mismatch(
    folder: Path, shape: tuple[int, ...], error: type[AdapterError], names: tuple[str, ...]
) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({A: torch.randn(shape)}))
    refuse(folder, BASE, error, A, *names)


def test_shape_mismatch_of_a_saved_embedding(tmp_path: Path) -> None:
    save_adapter(BASE, LoraConfig(r=2), tmp_path, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.randn(50, 16)}))
    refuse(tmp_path, BASE, AdapterIncompatibleError, key, "[50, 16]", "[48, 16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[A].view(-1)[:3].fill_(value))
    refuse(folder, BASE, AdapterInvalidError, A, "3 of 64")


def test_zero_norm_under_dora(tmp_path: Path) -> None:
    base = build_base("llama")
    base.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    save_adapter(base, config, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{Q}.lora_B.weight"][3].zero_())
    refuse(tmp_path, base, AdapterInvalidError, "model.layers.0.self_attn.q_proj", "1 of 16")


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    base = build_base("llama-tied")
    save_adapter(base, LoraConfig(r=2), tmp_path, save_embedding_layers=True)
    head = "base_model.model.lm_head.weight"
    edit_tensors(tmp_path, lambda tensors: tensors[head].neg_())
    embedding = "base_model.model.model.embed_tokens.weight"
    refuse(tmp_path, base, AdapterInvalidError, head, embedding)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"target_modules": ["embed_tokens"]}, "base_model.model.lm_head.lora_A.weight"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "base_model.model.lm_head.weight",
        ),
    ],
)
def test_tied_adapters_that_differ(fields: dict[str, Any], key: str, tmp_path: Path) -> None:
    base = build_base("llama-tied")
    save_adapter(base, LoraConfig(r=2, ensure_weight_tying=True, **fields), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[key].neg_())
    refuse(tmp_path, base, AdapterInvalidError, "ensure_weight_tying", "lm_head")


def test_tied_embedding_left_out(tmp_path: Path) -> None:
    base = build_base("llama-tied")
    config = LoraConfig(r=2, ensure_weight_tying=True, target_modules=["embed_tokens"])
    save_adapter(base, config, tmp_path)
    edit_config(tmp_path, exclude_modules=["embed_tokens"])
    refuse(tmp_path, base, AdapterInvalidError, "ensure_weight_tying", "model.embed_tokens")


def test_changed_bias_of_a_module_of_an_unknown_kind(tmp_path: Path) -> None:
    base = build_base("qwen2")
    save_adapter(base, LoraConfig(r=2, target_modules=["o_proj"], bias="all"), tmp_path)
    layout = layout_of(base)
    name = "model.layers.0.self_attn.k_proj"
    spec = layout.modules[name]
    odd = type(spec)(name, "other", (), spec.parameters)
    changed = type(layout)("qwen2", {**layout.modules, name: odd}, layout.weight)
    with pytest.raises(AdapterUnsupportedError, match=re.escape(f"{name}.bias")):
        compile_adapter(open_folder(tmp_path, "a", "s"), changed)


def test_tied_head_with_a_bias_of_its_own(tmp_path: Path) -> None:
    base = build_base("llama-tied")
    config = LoraConfig(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    save_adapter(base, config, tmp_path)
    layout = layout_of(base)
    head = layout.modules["lm_head"]
    odd = type(head)(
        "lm_head", "linear", head.shape, {**head.parameters, "bias": (48,)}, tied_to=head.tied_to
    )
    changed = type(layout)("llama", {**layout.modules, "lm_head": odd}, layout.weight)
    with pytest.raises(AdapterUnsupportedError, match=r"ensure_weight_tying.*lm_head.*bias"):
        compile_adapter(open_folder(tmp_path, "a", "s"), changed)
