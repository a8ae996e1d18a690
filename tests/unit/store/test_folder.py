"""Adapter folders: broken files, the digest, the record, and independence of heavy imports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from manylora_store.checkpoint.config import MAX_CONFIG_BYTES
from manylora_store.checkpoint.folder import open_folder
from manylora_store.errors import AdapterInvalidError
from unit.store.intake_support import write_one_of_each_dtype
from unit.store.store_support import (
    compile_folder,
    edit_config,
    edit_tensors,
    save_adapter,
)
from unit.store.tiny_models import build_base

BASE = build_base("llama")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(BASE, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path)


def digest(folder: Path) -> str:
    return open_folder(folder, "name", "file:x").digest


def test_digest_depends_on_content_only(folder: Path) -> None:
    original = digest(folder)
    assert len(original) == 64
    assert open_folder(folder, "other", "hf:org/repo").digest == original
    raw = json.loads((folder / "adapter_config.json").read_text())
    edit_config(
        folder,
        base_model_name_or_path="elsewhere",
        peft_version="0.1",
        inference_mode=not raw["inference_mode"],
        target_modules=raw["target_modules"][::-1],
    )
    assert digest(folder) == original
    edit_config(folder, lora_alpha=9)
    assert digest(folder) != original


def test_digest_is_the_one_of_the_first_release(tmp_path: Path) -> None:
    write_one_of_each_dtype(tmp_path)
    expected = "550b684f7bf28522e49c8e89865a7e43c0b8dfbb7dffc85b6b2c6ea45f4aeedf"
    assert digest(tmp_path) == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_digest_depends_on_the_order_of_patterns(folder: Path, field: str) -> None:
    edit_config(folder, **{field: {"layers.0.self_attn.q_proj": 4, "q_proj": 4}})
    original = digest(folder)
    edit_config(folder, **{field: {"q_proj": 4, "layers.0.self_attn.q_proj": 4}})
    assert digest(folder) != original


@pytest.mark.parametrize("change", ["value", "dtype", "name", "shape"])
def test_digest_changes_with_every_part_of_a_tensor(folder: Path, change: str) -> None:
    original = digest(folder)

    def alter(tensors: dict[str, torch.Tensor]) -> None:
        key = min(tensors)
        tensor = tensors.pop(key)
        changed = {
            "value": tensor + 1e-6,
            "dtype": tensor.to(torch.bfloat16),
            "name": tensor,
            "shape": tensor.T.contiguous(),
        }
        tensors[key + "x" if change == "name" else key] = changed[change]

    edit_tensors(folder, alter)
    assert digest(folder) != original


def test_record(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="org/base")
    files = open_folder(folder, "sql", "file:/somewhere")
    record = compile_folder(folder, BASE).record
    assert record.digest == files.digest
    assert (record.name, record.source) == ("test", "file:test")
    assert (record.peft_type, record.rank, record.base_model) == ("LORA", 4, "org/base")
    assert record.target_modules == ("q_proj", "v_proj")
    assert record.ranks == {
        f"model.layers.{layer}.self_attn.{name}": 4
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    }
    assert record.parameters == 2 * 4 * (16 + 16 + 16 + 8)
    assert record.bytes == (folder / WEIGHTS).stat().st_size
    assert record.warnings == ()
    json.dumps(record.as_dict())


def test_an_adapter_without_effect_is_kept_with_a_warning(folder: Path) -> None:
    edit_tensors(folder, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    compiled = compile_folder(folder, BASE)
    assert len(compiled.patches) == 4
    assert "no effect" in compiled.record.warnings[0]


def test_patterns_and_saved_modules_that_match_nothing_are_warned_of(folder: Path) -> None:
    edit_config(
        folder, rank_pattern={"k_proj": 3}, alpha_pattern={"o_proj": 3}, modules_to_save=["score"]
    )
    warnings = " ".join(compile_folder(folder, BASE).record.warnings)
    assert all(name in warnings for name in ("'k_proj'", "'o_proj'", "'score'"))


def test_missing_biases_are_warned_of(folder: Path) -> None:
    edit_config(folder, bias="lora_only")
    assert "lora_only" in compile_folder(folder, BASE).record.warnings[0]


def fails(folder: Path, *names: str) -> None:
    with pytest.raises(AdapterInvalidError) as caught:
        open_folder(folder, "name", "file:x")
    for name in names:
        assert name in caught.value.message


def test_not_a_folder(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere", "not a folder")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{", "not valid JSON"),
        ("[1]", "list"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
        ("[" * 100_000, "not valid JSON"),
        ('{"r": 8}', "no peft_type"),
        (" " * (MAX_CONFIG_BYTES + 1), str(MAX_CONFIG_BYTES)),
        ('{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}', "not valid JSON"),
        ('{"peft_type": "LORA", "lora_alpha": 1' + "0" * 400 + "}", "lora_alpha"),
    ],
)
def test_broken_configuration(folder: Path, text: str, name: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    fails(folder, "adapter_config.json", name)


def test_missing_or_unreadable_configuration(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_bytes(b"\xff\xfe{}")
    fails(folder, "adapter_config.json", "not valid JSON")
    path.unlink()
    fails(folder, "adapter_config.json is missing")
    path.mkdir()
    fails(folder, "adapter_config.json cannot be read")


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    fails(folder, WEIGHTS, "adapter_model.bin")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_git_lfs_pointer(folder: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (folder / name).write_text(pointer)
    fails(folder, name, "Git LFS pointer", "git lfs pull")


def test_a_pickle_is_not_opened_as_it_is(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    fails(folder, "adapter_model.bin", "pickle", WEIGHTS)


def test_truncated_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    fails(folder, WEIGHTS, f"{len(whole) - 5} bytes", "truncated")


KEY = "base_model.model.lm_head.weight"


def test_unwelcome_safetensors_dtype(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({KEY: torch.ones(2, dtype=torch.int8)}))
    fails(folder, KEY, "I8", "float32")
