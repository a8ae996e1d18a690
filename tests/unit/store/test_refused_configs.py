"""Configurations that are refused: the class of the error, and that it names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig

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
    refuse,
    save_adapter,
)
from unit.store.tiny_models import build_base, layout_of

BASE = build_base("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(BASE, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("enable_lora", [True, False, True]),
        ("a_field_of_the_future", "on"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of_the_future"),
    ],
)
def test_unsupported_fields(folder: Path, field: str, value: Any) -> None:
    edit_config(folder, **{field: value})
    refuse(folder, BASE, AdapterUnsupportedError, field, repr(value))


def test_unsupported_peft_type(folder: Path) -> None:
    edit_config(folder, peft_type="LOHA")
    refuse(folder, BASE, AdapterUnsupportedError, "LOHA", "LORA, ADALORA")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", ...),
        ("peft_type", 7),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", "8"),
        ("use_dora", 1),
        ("bias", "some"),
        ("rank_pattern", [3]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("exclude_modules", {"a": 1}),
        ("modules_to_save", "lm_head"),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", 3),
        ("base_model_name_or_path", 3),
        ("layers_pattern", "layers"),
    ],
)
def test_wrong_types_and_values(folder: Path, field: str, value: Any) -> None:
    edit_config(folder, **{field: value})
    refuse(folder, BASE, AdapterInvalidError, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True, "lora_bias": True},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    ],
)
def test_contradicting_fields(folder: Path, fields: dict[str, Any]) -> None:
    edit_config(folder, **fields)
    refuse(folder, BASE, AdapterInvalidError, *list(fields)[:1])


def test_dora_is_not_for_adalora(tmp_path: Path) -> None:
    save_adapter(BASE, AdaLoraConfig(total_step=9, target_modules=["q_proj"]), tmp_path)
    edit_config(tmp_path, use_dora=True)
    refuse(tmp_path, BASE, AdapterInvalidError, "use_dora", "ADALORA")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", ["(q_proj", "q{99999999999}"])
def test_malformed_pattern(folder: Path, field: str, pattern: str) -> None:
    edit_config(folder, **{field: pattern})
    refuse(folder, BASE, AdapterInvalidError, "regular expression")


def test_no_default_targets_for_the_model_type(folder: Path) -> None:
    edit_config(folder, target_modules=None)
    layout = layout_of(BASE)
    unknown = type(layout)("some-new-model", layout.modules, layout.weight)
    with pytest.raises(AdapterInvalidError, match=r"target_modules.*some-new-model"):
        compile_adapter(open_folder(folder, "a", "s"), unknown)


def test_targets_that_match_nothing(folder: Path) -> None:
    edit_config(folder, target_modules=["query_key_value"])
    refuse(folder, BASE, AdapterIncompatibleError, "query_key_value", "llama")


def test_target_that_is_not_linear(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "input_layernorm"])
    refuse(folder, BASE, AdapterUnsupportedError, "model.layers.0.input_layernorm", "norm")


def test_lora_bias_on_an_embedding(folder: Path) -> None:
    edit_config(folder, target_modules=["q_proj", "embed_tokens"], lora_bias=True)
    refuse(folder, BASE, AdapterInvalidError, "lora_bias", "model.embed_tokens")


def test_adalora_on_an_embedding(tmp_path: Path) -> None:
    save_adapter(BASE, AdaLoraConfig(total_step=9, target_modules=["q_proj"]), tmp_path)
    edit_config(tmp_path, target_modules=["embed_tokens"])
    refuse(tmp_path, BASE, AdapterInvalidError, "AdaLoRA", "model.embed_tokens")


@pytest.mark.parametrize(
    ("pattern", "error", "names"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_E": [True]}, AdapterInvalidError, "1 entries"),
        ({"model.layers.9.q_proj.lora_E": [True] * 12}, AdapterIncompatibleError, "layers.9"),
        ({"model.layers.0.self_attn.q_proj.lora_E": 3}, AdapterInvalidError, "rank_pattern"),
    ],
)
def test_adalora_rank_pattern(
    pattern: dict[str, Any], error: type[AdapterError], names: str, tmp_path: Path
) -> None:
    save_adapter(BASE, AdaLoraConfig(total_step=9, target_modules=["q_proj"]), tmp_path)
    edit_config(tmp_path, rank_pattern=pattern)
    refuse(tmp_path, BASE, error, names)


def test_module_both_adapted_and_replaced(folder: Path) -> None:
    edit_config(folder, modules_to_save=["proj"])
    refuse(folder, BASE, AdapterUnsupportedError, "q_proj", "target_modules", "modules_to_save")


def test_replaced_module_of_an_unknown_kind(folder: Path) -> None:
    layout = layout_of(BASE)
    norm = layout.modules["model.norm"]
    odd = type(norm)(norm.name, "other", norm.shape, norm.parameters)
    changed = type(layout)("llama", {**layout.modules, "model.norm": odd}, layout.weight)
    edit_config(folder, modules_to_save=["model.norm"])
    with pytest.raises(AdapterUnsupportedError, match=r"modules_to_save covers 'model\.norm'"):
        compile_adapter(open_folder(folder, "a", "s"), changed)
