"""The compiled algebra against PEFT's own layers, module by module and as logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig

from unit.store.store_support import (
    assert_same_as_peft,
    save_adapter,
)
from unit.store.tiny_models import build_base

LORA_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default-targets": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 1},
            "alpha_pattern": {"v_proj": 3, "model.layers.0.self_attn.q_proj": 20},
        },
    ),
    "patterns-rslora": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 5}, "use_rslora": True},
    ),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear-gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "full-names": ("llama", {"target_modules": ["model.layers.1.mlp.gate_proj"]}),
    "exclude": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    ),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layers-pattern": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": [0], "layers_pattern": "h"},
    ),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "embedding-tied": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "both-tied": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "ensure-tying": (
        "llama-tied",
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "ensure_weight_tying": True,
            "alpha_pattern": {"lm_head": 9},
        },
    ),
    "ensure-tying-regex": (
        "llama-tied",
        {"target_modules": "lm_head|.*q_proj", "ensure_weight_tying": True, "use_dora": True},
    ),
    "ensure-tying-not-tied": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "gemma-scaled-embedding": ("gemma3", {"target_modules": ["embed_tokens", "o_proj"]}),
    "gemma-dora": ("gemma3", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    "gpt2-default": ("gpt2", {"fan_in_fan_out": True}),
    "gpt2-wrong-fan": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}),
    "gpt2-embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_fc"]}),
    "dora-bias": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "dora-gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "dora-rslora": (
        "llama",
        {
            "target_modules": ["embed_tokens", "lm_head", "v_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"v_proj": 7},
        },
    ),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-all-dora": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "use_dora": True}),
    "bias-all-lora-bias": (
        "qwen2",
        {"target_modules": ["q_proj", "o_proj"], "bias": "all", "lora_bias": True},
    ),
    "bias-all-saved-norms": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_1", "wte"]},
    ),
    "saved-embedding-tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved-head-tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "saved-tied-together": (
        "llama-tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "saved-both-and-norms": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "saved-scaled-embedding": (
        "gemma3",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved-container": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved-conv1d": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp.c_proj"]}),
    "initialisation-mica": ("llama", {"init_lora_weights": "mica", "target_modules": ["q_proj"]}),
    "initialisation-orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_equals_peft(case: str, tmp_path: Path) -> None:
    kind, fields = LORA_CASES[case]
    base = build_base(kind)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields)
    folder = save_adapter(base, config, tmp_path)
    compiled = assert_same_as_peft(base, folder)
    assert compiled.record.rank >= 4
    assert not any("no effect: " in warning for warning in compiled.record.warnings)


ADALORA_CASES: dict[str, tuple[str, dict[str, Any], dict[str, list[bool]] | None]] = {
    "unpruned": ("llama", {}, None),
    "default-targets": ("gpt2", {}, None),
    "pruned": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "model.layers.0.self_attn.q_proj": [True, False, True, False, True],
            "model.layers.1.self_attn.q_proj": [False] * 5,
        },
    ),
    "pruned-without-alpha": (
        "llama",
        {"target_modules": ["q_proj"], "lora_alpha": 0},
        {"model.layers.0.self_attn.q_proj": [False, True, True, False, True]},
    ),
    "ignores-lora-fields": (
        "qwen2",
        {
            "target_modules": ["q_proj", "o_proj"],
            "use_rslora": True,
            "lora_bias": True,
            "alpha_pattern": {"q_proj": 40},
            "bias": "lora_only",
        },
        None,
    ),
    "saved-modules": (
        "llama-tied",
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
        None,
    ),
}


@pytest.mark.parametrize("case", ADALORA_CASES)
def test_adalora_equals_peft(case: str, tmp_path: Path) -> None:
    kind, fields, masks = ADALORA_CASES[case]
    base = build_base(kind)
    options = {"init_r": 5, "lora_alpha": 30, "total_step": 10, "task_type": "CAUSAL_LM"}
    folder = save_adapter(base, AdaLoraConfig(**options | fields), tmp_path, rank_masks=masks)
    assert_same_as_peft(base, folder)
