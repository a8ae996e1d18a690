"""What files hold besides factors: embeddings, other dtypes, other spellings of names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from manylora_store.compiler.canonical import CompiledAdapter, LowRank
from unit.store.store_support import (
    assert_same_as_peft,
    compile_folder,
    edit_tensors,
    save_adapter,
)
from unit.store.tiny_models import build_base


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("dora", [False, True])
def test_changed_embedding_below_an_adapter_equals_peft(
    kind: str, dora: bool, tmp_path: Path
) -> None:
    base = build_base(kind)
    config = LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], use_dora=dora)
    folder = save_adapter(base, config, tmp_path)

    def retrain(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(5)
        embedding = tensors["base_model.model.model.embed_tokens.base_layer.weight"]
        embedding.copy_(torch.randn_like(embedding))
        head = tensors["base_model.model.lm_head.base_layer.weight"]
        head.copy_(torch.randn_like(head) if kind == "llama" else embedding)

    edit_tensors(folder, retrain)
    compiled = assert_same_as_peft(base, folder)
    for name in ("model.embed_tokens", "lm_head"):
        assert compiled.patches[name].replacement is not None


def test_changed_embedding_without_an_adapter_changes_the_tied_head_too(tmp_path: Path) -> None:
    base = build_base("llama-tied")
    folder = save_adapter(base, LoraConfig(r=2), tmp_path, save_embedding_layers=True)

    def retrain(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("base_model.model.lm_head.weight")
        tensors["base_model.model.model.embed_tokens.weight"].neg_()

    edit_tensors(folder, retrain)
    compiled = assert_same_as_peft(base, folder)
    head = compiled.patches["lm_head"].replacement
    embedding = compiled.patches["model.embed_tokens"].replacement
    assert head is not None
    assert embedding is not None
    assert head["weight"] is embedding["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_but_unchanged_embeddings_have_no_effect(dtype: torch.dtype, tmp_path: Path) -> None:
    base = build_base("llama")
    folder = save_adapter(base, LoraConfig(r=2), tmp_path, save_embedding_layers=True)
    keys = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    edit_tensors(folder, lambda tensors: tensors.update({k: tensors[k].to(dtype) for k in keys}))
    compiled = compile_folder(folder, base)
    assert all(patch.replacement is None for patch in compiled.patches.values())
    for key in keys:
        assert any(key in warning for warning in compiled.record.warnings)
    factors = sum(low.a.numel() + low.b.numel() for low in _low_ranks(compiled))
    assert compiled.record.parameters == factors


def test_an_adapter_saved_in_bfloat16_is_compiled_in_float32(tmp_path: Path) -> None:
    base = build_base("llama")
    folder = save_adapter(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    edit_tensors(folder, lambda t: t.update({k: v.to(torch.bfloat16) for k, v in t.items()}))
    compiled = assert_same_as_peft(base, folder)
    assert {low.a.dtype for low in _low_ranks(compiled)} == {torch.float32}


@pytest.mark.parametrize("suffix", [".default.weight", ".weight"])
def test_dora_magnitude_and_adapter_name_spellings(suffix: str, tmp_path: Path) -> None:
    base = build_base("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    folder = save_adapter(base, config, tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            plain = key.removesuffix(".weight")
            tensors[plain + suffix] = tensors.pop(key)

    edit_tensors(folder, rename)
    assert_same_as_peft(base, folder)


def _low_ranks(compiled: CompiledAdapter) -> list[LowRank]:
    return [patch.low_rank for patch in compiled.patches.values() if patch.low_rank is not None]
