"""Trains the demo's base: a small Llama, from nothing, on plain tales and named styles."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manylora_server.demo.batches import batches, mixture
from manylora_server.demo.loop import train
from manylora_server.demo.rounding import add_rounding, remove_rounding
from manylora_server.demo.tokenizer import MAX_TOKENS

STEPS = 3000
BATCH = 16
PEAK_RATE = 1.5e-3
PLAIN_SHARE = 0.45
ROUNDED_FROM = 0.6
"""The part of training after which every second step sees weights rounded to NF4."""


def new_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; every linear layer has sides that are multiples of NF4's block."""
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token"))
        for name in ("bos", "eos", "pad")
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ids,
    )
    model = LlamaForCausalLM(config)
    # Words of one class, such as names, drift together while grammar is learned; a wide start
    # leaves them far enough apart to be told from one another, hence copied, afterwards.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.15)
    model.generation_config = GenerationConfig(**ids)
    return model


def train_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Train from a random start; the same seed gives the same model on the same machine."""
    torch.manual_seed(seed)
    model = new_base(tokenizer).train()
    roundings = add_rounding(model.model)

    def switch(step: int) -> None:
        for rounding in roundings:
            rounding.enabled = step >= ROUNDED_FROM * STEPS and step % 2 == 1

    train(
        "base",
        model,
        batches(mixture(seed, PLAIN_SHARE), tokenizer, BATCH, seed),
        steps=STEPS,
        peak_rate=PEAK_RATE,
        weight_decay=0.05,
        before_step=switch,
    )
    remove_rounding(model.model)
    return model.eval()
