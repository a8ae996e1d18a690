"""Checkpoints of 16 bits on a CPU: what is kept narrow, what is not, and what others see of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from manylora_kernels import native, select_backend
from manylora_server.core.config import ModelConfig
from manylora_server.model.half_linear import PORTABLE, HalfEmbedding, HalfLinear
from manylora_server.model.loader import LoadedModel, load_model
from manylora_server.model.packed_linear import PackedLinear
from manylora_server.model.self_test import run_self_test
from support.models import VOCAB, save_model

if native.missing is not None or native.library.isa == PORTABLE:
    pytest.skip(f"no fast kernels: {native.missing}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    select_backend("half_linear", native.NATIVE)
    yield
    select_backend("half_linear", "reference")


def load(folder: Path, quantization: Any = "none", dtype: str = "float32") -> LoadedModel:
    return load_model(
        ModelConfig(str(folder), "base", quantization=quantization, device="cpu", dtype=dtype)
    )


def kinds(loaded: LoadedModel) -> dict[str, type[nn.Module]]:
    return {
        name: type(module)
        for name, module in loaded.model.named_modules()
        if isinstance(module, HalfLinear | PackedLinear | nn.Linear)
    }


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_dense_base_stays_in_16_bits(
    architecture: str, stored: torch.dtype, tmp_path: Path
) -> None:
    save_model(architecture, tmp_path, stored=stored)
    loaded = load(tmp_path)
    assert set(kinds(loaded).values()) == {HalfLinear}
    layers = [m for m in loaded.model.modules() if isinstance(m, HalfLinear)]
    assert {layer.weight_half.tiles.dtype for layer in layers} == {stored}
    assert {layer.weight.dtype for layer in layers} == {torch.float32}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name in kinds(loaded):
        module = dense.get_submodule(name)
        plain = module.weight.t() if architecture == "gpt2" and name != "lm_head" else module.weight
        assert torch.equal(loaded.layout.weight(name, "weight"), plain), name


def test_a_4_bit_base_s_head_stays_in_16_bits(tmp_path: Path) -> None:
    save_model("llama", tmp_path, stored=torch.bfloat16)
    assert kinds(load(tmp_path, "nf4")) == {"lm_head": HalfLinear}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gpt_bigcode"])
def test_a_tied_head_and_the_embeddings_share_16_bits(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    save_model(architecture, tmp_path, stored=torch.bfloat16)
    loaded = load(tmp_path, quantization)
    model = loaded.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, HalfLinear)
    assert isinstance(embedding, HalfEmbedding)
    assert embedding.weight_half is head.weight_half
    assert not any(parameter.shape[0] == VOCAB for parameter in model.parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = plain.get_input_embeddings().weight
    name = next(name for name, module in model.named_modules() if module is embedding)
    assert torch.equal(loaded.layout.weight(name, "weight"), expected)
    assert torch.equal(loaded.layout.weight("lm_head", "weight"), expected)
    ids = torch.tensor([[0, 15, 16, VOCAB - 1], [3, 3, 200, 31]])
    assert torch.equal(embedding(ids), plain.get_input_embeddings()(ids))
    error = run_self_test(model, loaded.vocab_size, loaded.dtype, loaded.device).error
    assert error < 1e-5


def test_embeddings_of_a_class_of_their_own_stay_beside_a_half_head(tmp_path: Path) -> None:
    save_model("gemma3_text", tmp_path, stored=torch.bfloat16)
    loaded = load(tmp_path, "nf4")
    assert kinds(loaded) == {"lm_head": HalfLinear}
    assert loaded.model.get_input_embeddings().weight.dtype == torch.float32
    embeddings = loaded.layout.weight("model.embed_tokens", "weight")
    assert torch.equal(loaded.layout.weight("lm_head", "weight"), embeddings)


def test_float32_values_stay_float32(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    assert set(kinds(load(tmp_path)).values()) == {PackedLinear}


def test_without_a_kernel_nothing_is_narrow(tmp_path: Path) -> None:
    select_backend("half_linear", "reference")
    save_model("llama", tmp_path, stored=torch.bfloat16)
    assert set(kinds(load(tmp_path)).values()) == {PackedLinear}


def test_with_the_portable_kernel_nothing_is_narrow(tmp_path: Path) -> None:
    save_model("llama", tmp_path, stored=torch.bfloat16)
    before = native.library.isa
    native.library.select_isa(PORTABLE)
    try:
        assert set(kinds(load(tmp_path)).values()) == {PackedLinear}
    finally:
        native.library.select_isa(before)


def test_activations_of_16_bits_go_torch_s_way(tmp_path: Path) -> None:
    save_model("llama", tmp_path, stored=torch.bfloat16)
    assert set(kinds(load(tmp_path, dtype="bfloat16")).values()) == {nn.Linear}
