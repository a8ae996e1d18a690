"""Tiny random models of every served architecture, saved as ordinary Hugging Face folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEAD_DIM = {"head_dim": 16}
_MOE = {"num_experts_per_tok": 2}

# What each architecture needs beyond, or instead of, the common settings.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2},
    "ernie4_5": {**_HEAD_DIM, "use_bias": False},
    "gemma": {**_HEAD_DIM, "tie_word_embeddings": True},
    "gemma2": {
        **_HEAD_DIM,
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {
        **_HEAD_DIM,
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": {**_HEAD_DIM, "partial_rotary_factor": 0.5},
    "glm4": {**_HEAD_DIM, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "n_inner": 128,
        "tie_word_embeddings": True,
    },
    "gpt_bigcode": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "n_inner": 128,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {},
    "granite": {
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
    },
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {**_MOE, "num_local_experts": 4},
    "nemotron": {},
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {**_HEAD_DIM},
    "qwen3_moe": {
        **_HEAD_DIM,
        **_MOE,
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
    "smollm3": {},
    "starcoder2": {"sliding_window": None},
}


def build_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random float32 model whose logits are well spread."""
    settings = {**_COMMON, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges: every byte is a token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_model(
    architecture: str, folder: Path, seed: int = 0, stored: torch.dtype = torch.float32
) -> Any:
    """Save a model with its tokenizer to ``folder`` as ``stored``; return the same in float32."""
    model = build_model(architecture, seed)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))
    copy.deepcopy(model).to(stored).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model
