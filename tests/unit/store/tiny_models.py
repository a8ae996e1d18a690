"""Tiny random base models of several architectures, and their layouts as the server has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from manylora_store.compiler.canonical import BaseLayout, ModuleKind, ModuleSpec

VOCABULARY = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def _llama(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=True))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config)


def _gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=8))


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(tied=False),
    "llama-tied": lambda: _llama(tied=True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gpt2": _gpt2,
    "gemma3": _gemma3,
}


def build_base(kind: str) -> PreTrainedModel:
    """Return a float32 model in which every parameter is random, biases and norms included."""
    torch.manual_seed(0)
    model = _BUILDERS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.2
            noise = spread * torch.randn_like(parameter)
            parameter.copy_(noise + 1 if "norm" in name or "ln_" in name else noise)
    return model.requires_grad_(False)


def layout_of(model: PreTrainedModel) -> BaseLayout:
    """Describe a dense model the way the server does."""
    modules = dict(model.named_modules())
    embedding = next(n for n, m in modules.items() if m is model.get_input_embeddings())
    specs = {}
    for name, module in modules.items():
        own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        head = module is model.get_output_embeddings()
        tied = head and module.weight is model.get_input_embeddings().weight
        specs[name] = ModuleSpec(
            name=name,
            kind=_kind(module, own),
            shape=_shape(module),
            parameters=own,
            transposed=isinstance(module, Conv1D),
            is_output_head=head,
            tied_to=embedding if tied else None,
            output_multiplier=float(getattr(module, "embed_scale", 1.0)),
        )

    def weight(name: str, parameter: str) -> torch.Tensor:
        tensor = modules[name].get_parameter(parameter).detach().float()
        if parameter == "weight" and specs[name].transposed:
            return tensor.T
        return tensor

    return BaseLayout(model.config.model_type, specs, weight)


def _kind(module: nn.Module, own: Mapping[str, tuple[int, ...]]) -> ModuleKind:
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    is_norm = "Norm" in type(module).__name__ and all(len(shape) == 1 for shape in own.values())
    return "norm" if is_norm else "other"


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear | nn.Embedding):
        return tuple(module.weight.shape)
    return tuple(module.weight.T.shape) if isinstance(module, Conv1D) else ()
