"""Trains the demo's adapters with PEFT on the frozen base, each of another kind."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from manylora_server.demo.batches import batches
from manylora_server.demo.corpus import samples
from manylora_server.demo.loop import train
from manylora_server.demo.rounding import FrozenWeights

BASE_NAME = "manylora-demo"
STEPS = 300
LONGER = {"german": 600, "json": 600, "rhyme": 800, "shout": 1000}
"""Steps for the styles that are furthest from the plain tales."""

BATCH = 16
PEAK_RATE = 5e-3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

ADAPTERS: dict[str, dict[str, Any]] = {
    "emoji": {"r": 2, "lora_alpha": 4, "target_modules": MLP},
    "german": {"r": 12, "lora_alpha": 12, "target_modules": "all-linear", "use_rslora": True},
    "json": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"q_proj": 2, "down_proj": 12},
        "alpha_pattern": {"down_proj": 24},
    },
    "news": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "pirate": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "rhyme": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        "use_dora": True,
    },
    "shout": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}
"""What differs between the adapters, as arguments of `LoraConfig`; the name is also the style."""


def train_adapter(
    name: str,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> PeftModel:
    """Train one adapter; `base` keeps its weights and gets the adapter's modules put into it."""
    torch.manual_seed(seed)
    weights = FrozenWeights(base.model)
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=BASE_NAME, **ADAPTERS[name])
    model = get_peft_model(base, config).train()
    train(
        name,
        model,
        batches(samples(name, seed), tokenizer, BATCH, seed),
        steps=LONGER.get(name, STEPS),
        peak_rate=PEAK_RATE,
        weight_decay=0.0,
        before_step=lambda step: weights.use(rounded=step % 2 == 1),
    )
    weights.use(rounded=False)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    return model.eval()
