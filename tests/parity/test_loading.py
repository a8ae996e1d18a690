"""Ways to load a base: quantized now, from the cache, already quantized, dense; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from manylora_server.core.config import ModelConfig
from manylora_server.core.errors import StartupError
from manylora_server.model import loader, quantized_cache
from manylora_server.model.attention import PagedAttention
from manylora_server.model.experts import NF4Experts
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.self_test import run_self_test
from support.adapters import lora, save_adapter
from support.models import VOCAB, build_model, save_model
from support.oracle import Oracle, greedy
from support.serving import build, inner, request, run, tokens_of

PROMPT = [5, 60, 7, 200, 31, 8, 9]


def served_tokens(folder: Path, home: Path, adapters: dict[str, Path], **kind: str) -> list[int]:
    engine = build(folder, home, adapters=adapters, **kind)
    asked = request("r", PROMPT, engine.adapters.resolve("a"), max_tokens=12)
    return tokens_of(run(inner(engine), {0: [asked]})["r"])


def test_the_second_start_takes_the_cache_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, home = tmp_path / "base", tmp_path / "home"
    adapters = {"a": save_adapter(save_model("llama", folder), lora("llama"), tmp_path / "a", 1)}
    first = served_tokens(folder, home, adapters, quantization="nf4")
    cached = list((home / "quantized").iterdir())
    assert len(cached) == 1
    monkeypatch.setattr(quantized_cache, "store", None)  # a second store would fail
    assert served_tokens(folder, home, adapters, quantization="nf4") == first
    expected, _ = greedy(Oracle(folder, "nf4", adapters).model("a"), PROMPT, 12)
    assert first == expected


def test_a_changed_checkpoint_is_quantized_again(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_model("llama", folder, seed=1)
    before = quantized_cache.cache_key(folder, "torch.float32")
    save_model("llama", folder, seed=2)
    assert quantized_cache.cache_key(folder, "torch.float32") != before


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "base"
    adapters = {"a": save_adapter(save_model("llama", folder), lora("llama"), tmp_path / "a", 1)}
    home = tmp_path / "home"
    home.mkdir()
    (home / "quantized").write_text("a file where the folder should be")
    assert served_tokens(folder, home, adapters, quantization="nf4")
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_checkpoint_that_is_already_4_bit_is_taken_as_it_is(
    quant_type: str, double: bool, tmp_path: Path
) -> None:
    save_model("qwen2", tmp_path / "dense")
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    folder = tmp_path / "quantized"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=recipe, dtype=torch.float32
    )
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tmp_path / "dense" / "tokenizer.json").read_bytes())
    loaded = loader.load_model(ModelConfig(str(folder), "base", dtype="float32"))
    layers = [m for m in loaded.model.modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14
    assert {layer.weight_nf4.quant_type for layer in layers} == {quant_type}
    assert all((layer.weight_nf4.absmax_code is not None) == double for layer in layers)
    run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, loaded.device)
    packed = model.model.layers[0].mlp.up_proj.weight
    expected = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    got = loaded.layout.weight("model.layers.0.mlp.up_proj", "weight")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_head_norms_and_embeddings_stay_dense_and_experts_do_not(tmp_path: Path) -> None:
    save_model("mixtral", tmp_path / "base")
    loaded = loader.load_model(ModelConfig(str(tmp_path / "base"), "base"))
    experts = [m for m in loaded.model.modules() if isinstance(m, NF4Experts)]
    assert len(experts) == 2
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(loaded.layout.weight("lm_head", "weight"), dense.lm_head.weight)
    assert loaded.layout.modules["lm_head"].kind == "linear"
    assert not any(parameter.dim() == 3 for parameter in loaded.model.parameters())
    assert loaded.model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not served"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
    ],
)
def test_what_cannot_be_served_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    save_model("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartupError, match=message):
        loader.load_model(ModelConfig(str(folder), "base"))


def test_llm_int8_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    save_model("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model.save_pretrained(folder)
    with pytest.raises(StartupError, match=r"LLM\.int8"):
        loader.load_model(ModelConfig(str(folder), "base"))


def test_a_model_that_is_computed_otherwise_is_refused(tmp_path: Path) -> None:
    """The self-test notices an attention that our route does not see."""
    save_model("llama", tmp_path / "base")
    loaded = loader.load_model(ModelConfig(str(tmp_path / "base"), "base", quantization="none"))
    layer = loaded.model.model.layers[1].self_attn
    original = layer.forward

    def shifted(*args: object, **kwargs: object) -> object:
        hidden, weights = original(*args, **kwargs)
        # Something that depends on how many tokens come at once, as recurrent state does.
        return hidden + 0.1 * hidden.mean(dim=1, keepdim=True), weights

    layer.forward = shifted
    with pytest.raises(StartupError, match="would be served wrongly"):
        run_self_test(loaded.model, loaded.vocab_size, loaded.dtype, loaded.device)


@pytest.mark.parametrize("model", ["./missing", "/missing", "~/missing"])
def test_a_missing_folder(model: str) -> None:
    with pytest.raises(StartupError, match="no such folder"):
        loader.resolve_folder(model)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        loader.resolve_folder(str(tmp_path))


@pytest.mark.parametrize("damage", [1.5, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_our_attention_gets_wrong_is_refused(
    damage: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = PagedAttention.__call__

    def damaged(self: PagedAttention, *args: Any) -> torch.Tensor:
        return attend(self, *args) * damage

    monkeypatch.setattr(PagedAttention, "__call__", damaged)
    with pytest.raises(StartupError, match="would be served wrongly"):
        run_self_test(build_model("llama").to(dtype), VOCAB, dtype, torch.device("cpu"))
