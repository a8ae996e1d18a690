"""PEFT adapters with random signed weights, saved as PEFT saves them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

# Substrings that mark an adapter's own parameters in a PeftModel.
_OWN = ("lora_", "modules_to_save.")


def attention_targets(architecture: str) -> list[str]:
    """Return the names of the attention's linear modules."""
    return {
        "gpt2": ["c_attn"],
        "gpt_bigcode": ["c_attn"],
        "gpt_neox": ["query_key_value"],
        "persimmon": ["query_key_value"],
        "phi3": ["qkv_proj", "o_proj"],
    }.get(architecture, ["q_proj", "v_proj"])


def lora(architecture: str, **changes: Any) -> LoraConfig:
    """Return a LoRA configuration for ``architecture``."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": attention_targets(architecture),
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": architecture == "gpt2",
    }
    return LoraConfig(**{**settings, **changes})


def adalora(architecture: str, **changes: Any) -> AdaLoraConfig:
    """Return an AdaLoRA configuration for ``architecture``."""
    settings: dict[str, Any] = {
        "init_r": 6,
        "target_r": 4,
        "lora_alpha": 24,
        "total_step": 100,
        "target_modules": attention_targets(architecture),
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": architecture == "gpt2",
    }
    return AdaLoraConfig(**{**settings, **changes})


def randomize(model: PeftModel, seed: int, strength: float = 0.3) -> None:
    """Give every parameter of the adapter signed, non-zero values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(mark in name for mark in _OWN) or "ranknum" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "modules_to_save" in name:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(strength * noise)


def save_adapter(base: Any, config: Any, folder: Path, seed: int) -> Path:
    """Create an adapter on ``base`` (left as it was), save it to ``folder`` and return that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(base, config)
        randomize(peft_model, seed)
        peft_model.save_pretrained(folder)
        peft_model.unload()
    return folder


def train_biases(adapter: Path, seed: int = 3) -> None:
    """Change the biases of the base that an adapter's file holds, as training would have."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        if name.endswith(".bias") and "lora_" not in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, {"format": "pt"})
