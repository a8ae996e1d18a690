"""What transformers and PEFT compute, one request at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load_base(folder: Path, quantization: str) -> Any:
    """Return the base as transformers loads it, in float32 arithmetic.

    bitsandbytes rounds activations and weights to bfloat16 on CPUs that have such instructions;
    that is switched off, so that the oracle is the float32 product of the same 4-bit weights.
    """
    if quantization == "none":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    _round_experts(model)
    return model


def _round_experts(model: Any) -> None:
    """Round 3-d expert weights to NF4, which transformers leaves dense and the server does not."""
    for _, parameter in model.named_parameters():
        if parameter.dim() != 3:
            continue
        for matrix in parameter.data:
            packed, state = bnb.functional.quantize_4bit(
                matrix.contiguous(), quant_type="nf4", compress_statistics=True
            )
            matrix.copy_(bnb.functional.dequantize_4bit(packed, state))


class Oracle:
    """One base with adapters, run one request at a time."""

    def __init__(self, folder: Path, quantization: str, adapters: dict[str, Path]) -> None:
        self._folder = folder
        self._quantization = quantization
        self._adapters = adapters

    def model(self, adapter: str | None) -> Any:
        """Return a fresh model with ``adapter`` alone on it."""
        base = load_base(self._folder, self._quantization)
        if adapter is None:
            return base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base, self._adapters[adapter]).eval()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Return ``count`` greedy tokens and the logits each was chosen from."""
    tokens = list(prompt)
    logits = []
    for _ in range(count):
        row = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        logits.append(row)
        tokens.append(int(row.argmax()))
    return tokens[len(prompt) :], torch.stack(logits)
