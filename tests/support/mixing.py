"""What a weighted mix of adapters should compute: by PEFT, and by adding up the deltas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_server.core.types import AdapterMix
from manylora_server.engine.async_engine import AsyncEngine
from support.oracle import load_base

Weights = Mapping[str, float]


def mix_of(engine: AsyncEngine, weights: Weights) -> AdapterMix:
    """Return the mix that a request with these weights gets; refused as a request's is."""
    mix = AdapterMix(
        tuple((engine.adapters.resolve(name), weight) for name, weight in weights.items())
    )
    engine.adapters.check_mixable(mix)
    return mix


def peft_cat(
    folder: Path, quantization: str, adapters: Mapping[str, Path], weights: Weights
) -> Any:
    """Return PEFT's own mix: ``add_weighted_adapter(combination_type="cat")``."""
    names = list(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(folder, quantization)
        model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(adapters[name], name)
        model.add_weighted_adapter(names, list(weights.values()), "mix", combination_type="cat")
        model.set_adapter("mix")
    return model.eval()


def summed(folder: Path, quantization: str, adapters: Mapping[str, Path], weights: Weights) -> Any:
    """Return the base with the weighted sum of what each adapter adds to each parameter.

    The deltas are those that PEFT merges into a dense base.
    """
    model = load_base(folder, quantization)
    for name, weight in weights.items():
        plain = load_base(folder, "none")
        transposed = {key for key, module in plain.named_modules() if isinstance(module, Conv1D)}
        before = {key: value.clone() for key, value in plain.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(plain, adapters[name]).merge_and_unload()
        after = merged.state_dict()
        for module_name, module in model.named_modules():
            deltas = {
                parameter: weight * (after[key] - before[key])
                for parameter in ("weight", "bias")
                if (key := f"{module_name}.{parameter}") in before
                and not torch.equal(after[key], before[key])
            }
            if deltas:
                if module_name in transposed and "weight" in deltas:
                    deltas["weight"] = deltas["weight"].t()
                module.register_forward_hook(_adding(deltas))
    return model


def _adding(deltas: dict[str, torch.Tensor]) -> Callable[[nn.Module, Any, torch.Tensor], Any]:
    weight, bias = deltas.get("weight"), deltas.get("bias")

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if weight is None:
            return output + bias
        if isinstance(module, nn.Embedding):
            return output + F.embedding(args[0], weight)
        return output + F.linear(args[0], weight, bias)

    return hook
