"""Merged checkpoints against PEFT's ``merge_and_unload``, for every kind of base and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from manylora_server.core.errors import AdapterRefusedError, InvalidRequestError
from support.adapters import adalora, lora, save_adapter, train_biases
from support.exporting import (
    assert_different,
    assert_same,
    export,
    load,
    logits,
    merged_by_peft,
    with_peft,
)
from support.models import ARCHITECTURES, build_model, save_model
from support.oracle import Oracle, load_base

BOTH = ["q_proj", "embed_tokens", "lm_head"]
NO_TIE = "ignore:Model has `tie_word_embeddings=True`"

KINDS: dict[str, tuple[str, Any]] = {
    "rslora": ("llama", lora("llama", r=8, use_rslora=True, target_modules="all-linear")),
    "dora": ("llama", lora("llama", use_dora=True, target_modules="all-linear")),
    "dora on Conv1D": ("gpt2", lora("gpt2", use_dora=True)),
    "adalora": ("llama", adalora("llama")),
    "adalora on Conv1D": ("gpt2", adalora("gpt2")),
    "patterns": (
        "llama",
        lora("llama", target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp": 7}),
    ),
    "modules_to_save": ("llama", lora("llama", modules_to_save=["lm_head", "norm"])),
    "embeddings and head": ("llama", lora("llama", target_modules=BOTH)),
    "biases": ("qwen2", lora("qwen2", bias="all")),
    "biases of norms": ("gpt2", lora("gpt2", bias="all")),
    "lora_bias": ("qwen2", lora("qwen2", lora_bias=True, bias="lora_only")),
    "trained head": ("phi", lora("phi", target_modules=["q_proj", "lm_head"])),
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    base = save_model(architecture, tmp_path / "base")
    adapter = save_adapter(base, lora(architecture), tmp_path / "adapter", 1)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert_same(merged, merged_by_peft(tmp_path / "base", adapter))
    assert_different(merged, base)
    assert report["base"]["weights"] == "dense"
    assert report["untied"] == []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    architecture, config = KINDS[kind]
    base = save_model(architecture, tmp_path / "base")
    adapter = save_adapter(base, config, tmp_path / "adapter", 2)
    train_biases(adapter)
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert_same(load(tmp_path / "out"), merged_by_peft(tmp_path / "base", adapter))


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("target", ["embedding", "head", "both"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`", "ignore:Model with `tie_word")
def test_a_tie_is_broken_where_an_adapter_changes_one_end(
    architecture: str, target: str, tmp_path: Path
) -> None:
    """PEFT merges into the parameter that both ends share; right is what it computes unmerged."""
    base = save_model(architecture, tmp_path / "base")
    embedding = "wte" if architecture == "gpt2" else "embed_tokens"
    targets = {"embedding": [embedding], "head": ["lm_head"], "both": [embedding, "lm_head"]}
    config = lora(architecture, target_modules=targets[target])
    adapter = save_adapter(base, config, tmp_path / "adapter", 3)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert_same(merged, with_peft(tmp_path / "base", adapter))
    assert merged.config.tie_word_embeddings is False
    assert len(report["untied"]) == 2


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`", "ignore:Model with `tie_word")
def test_a_tie_that_the_adapter_keeps_is_kept(architecture: str, tmp_path: Path) -> None:
    base = save_model(architecture, tmp_path / "base")
    config = lora(architecture, target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter = save_adapter(base, config, tmp_path / "adapter", 3)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert_same(merged, with_peft(tmp_path / "base", adapter))
    assert merged.config.tie_word_embeddings is True
    assert report["untied"] == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`", "ignore:Model with `tie_word")
def test_a_replaced_embedding_leaves_the_head_that_was_tied_to_it(tmp_path: Path) -> None:
    base = save_model("qwen2", tmp_path / "base")
    config = lora("qwen2", modules_to_save=["embed_tokens"])
    adapter = save_adapter(base, config, tmp_path / "adapter", 3)
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert_same(load(tmp_path / "out"), with_peft(tmp_path / "base", adapter))


def test_a_bias_is_made_where_the_architecture_can_have_one(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    config = lora("llama", lora_bias=True)
    adapter = save_adapter(base, config, tmp_path / "adapter", 4)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    merged = load(tmp_path / "out")
    # PEFT cannot merge it: its layers have no bias.
    assert_same(merged, with_peft(tmp_path / "base", adapter))
    assert merged.config.attention_bias is True
    assert merged.config.mlp_bias is False
    assert report["added_biases"] == 8


def test_a_bias_that_nothing_can_hold_is_refused(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    config = lora("llama", lora_bias=True, target_modules=["lm_head"])
    adapter = save_adapter(base, config, tmp_path / "adapter", 4)
    with pytest.raises(AdapterRefusedError, match="a bias to module 'lm_head'"):
        export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_scales_the_adapter(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 5)
    export(tmp_path / "base", {adapter: -0.5}, tmp_path / "out")
    expected = with_peft(tmp_path / "base", adapter)
    for module in expected.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= -0.5
    assert_same(load(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_sixteen_bits_are_rounded_once_from_the_exact_sum(
    dtype: str, stored: torch.dtype, tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "base", stored=stored)
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 6)
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    exact = merged_by_peft(tmp_path / "base", adapter).state_dict()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            got = file.get_tensor(name)
            assert got.dtype == wanted
            # The sums themselves may differ in the last bit of float32.
            torch.testing.assert_close(got, exact[name].to(wanted), rtol=1e-2, atol=1e-6)
            assert (got != exact[name].to(wanted)).double().mean() < 1e-2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(
        wanted
    ).removeprefix("torch.")


def test_a_base_keeps_its_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base", stored=torch.bfloat16)
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 6)
    assert export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")["dtype"] == "bf16"


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_shards_are_indexed_and_loaded(architecture: str, tmp_path: Path) -> None:
    base = save_model(architecture, tmp_path / "base")
    adapter = save_adapter(base, lora(architecture), tmp_path / "adapter", 7)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out", max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report["shards"] > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert report["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert_same(load(tmp_path / "out"), merged_by_peft(tmp_path / "base", adapter))


def test_sharded_and_pickled_bases_are_read_as_well(tmp_path: Path) -> None:
    base = save_model("qwen2", tmp_path / "one")
    adapter = save_adapter(base, lora("qwen2"), tmp_path / "adapter", 8)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    base.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    state = {name: t for name, t in base.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    expected = merged_by_peft(tmp_path / "one", adapter)
    for form in ("sharded", "pickled"):
        report = export(tmp_path / form, {adapter: 1.0}, tmp_path / f"out-{form}")
        assert_same(load(tmp_path / f"out-{form}"), expected)
        assert report["warnings"] == [
            "the base's folder holds no tokenizer, so the export has none"
        ]


def test_the_folder_has_all_that_a_checkpoint_has(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "extra.py").write_text("raise SystemExit")
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 1)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == "{{ messages }}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert report["adapters"][0]["digest"] in card
    assert "| adapter | 1 | LORA | 4 |" in card
    assert "base_model: base" in card


def test_nf4_is_what_bitsandbytes_makes_of_the_merged_weights(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    for architecture in ("llama", "gpt2", "mixtral"):
        folder = tmp_path / architecture
        base = save_model(architecture, folder / "base")
        adapter = save_adapter(base, lora(architecture), folder / "adapter", 1)
        report = export(folder / "base", {adapter: 1.0}, folder / "out", dtype="nf4")
        merged = load(folder / "out")
        dense = merged_by_peft(folder / "base", adapter)
        packed = 0
        for name, module in merged.named_modules():
            if not isinstance(module, bnb.nn.Linear4bit):
                continue
            packed += 1
            weight = dense.get_submodule(name).weight
            weight = (weight.T if architecture == "gpt2" else weight).contiguous()
            data, state = bnb.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            expected = bnb.functional.dequantize_4bit(data, state)
            got = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert (got - expected).abs().max() < 0.02 * expected.abs().max()
        assert packed == {"llama": 14, "gpt2": 8, "mixtral": 8}[architecture]
        assert not isinstance(merged.get_output_embeddings(), bnb.nn.Linear4bit)
        assert any("experts" in text for text in report["warnings"]) == (architecture == "mixtral")
        assert logits(merged).isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_base_in_4_bits_is_unpacked(architecture: str, tmp_path: Path) -> None:
    """bitsandbytes' own checkpoints hold nothing else; the result equals what they compute."""
    base = save_model(architecture, tmp_path / "dense")
    adapter = save_adapter(base, lora(architecture), tmp_path / "adapter", 1)
    packed = load_base(tmp_path / "dense", "nf4")
    packed.save_pretrained(tmp_path / "packed")
    report = export(tmp_path / "packed", {adapter: 1.0}, tmp_path / "out")
    assert report["base"]["weights"] == "dequantized"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    expected = Oracle(tmp_path / "dense", "nf4", {"adapter": adapter}).model("adapter")
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(expected), atol=1e-4, rtol=1e-5
    )
    assert_different(load(tmp_path / "out"), base)


def test_a_base_in_8_bits_is_refused(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 1)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidRequestError, match="quantized by 'gptq'"):
        export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")


def test_values_that_fp16_cannot_hold_are_told(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    with torch.no_grad():
        base.model.norm.weight[3] = 1e5
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 1)
    with pytest.raises(
        InvalidRequestError, match=r"1 values of 'model.norm.weight' are too large for float16"
    ):
        export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_no_result(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "adapter", 1)
    for dtype in ("fp32", "nf4"):
        with pytest.raises(InvalidRequestError, match="are not finite"):
            export(tmp_path / "base", {adapter: 1e39}, tmp_path / "out", dtype=dtype)
    # Finite weights, whose products are not.
    with pytest.raises(InvalidRequestError, match="logits of the merged model are not finite"):
        export(tmp_path / "base", {adapter: 1e37}, tmp_path / "out", check=True)
    assert not (tmp_path / "out").exists()


def test_names_without_the_model_s_prefix_are_understood_and_kept(tmp_path: Path) -> None:
    """As in GPT-2's original checkpoint."""
    base = save_model("gpt2", tmp_path / "base")
    adapter = save_adapter(base, lora("gpt2"), tmp_path / "adapter", 1)
    expected = merged_by_peft(tmp_path / "base", adapter)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors)
    assert_same(load(tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`", "ignore:Model with `tie_word")
def test_a_new_head_has_the_name_that_its_checkpoints_give_it(tmp_path: Path) -> None:
    model = build_model("gpt_neox", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    config = lora("gpt_neox", target_modules=["embed_in"])
    adapter = save_adapter(model, config, tmp_path / "adapter", 1)
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out")
    assert "embed_out.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert_same(load(tmp_path / "out"), with_peft(tmp_path / "base", adapter))
