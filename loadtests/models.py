"""Random Llama models and PEFT adapters, made once and kept in a cache folder.

Speed does not depend on what the weights are, and correctness is seen more sharply on random
ones: every adapter changes nearly every token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loadtests.tokens import build_tokenizer

# Raised whenever the same shape or seed would give other weights than before.
_RECIPE = 1
# Size of an adapter's change of a weight matrix, relative to the matrix.
_ADAPTER_STRENGTH = 0.3
_WEIGHT_GAIN = 1.5


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama. The output layer shares its weights with the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    positions: int
    # As most checkpoints have them; the adapters' factors then fit 16 bits as well.
    sixteen_bits: bool = False

    @property
    def parameters(self) -> int:
        """The exact number of weights."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv
        norms = 2 * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate + norms
        return self.vocabulary * self.hidden + self.layers * layer + self.hidden


SHAPES = {
    "tiny": ModelShape(64, 2, 4, 2, 128, 512, 512),
    "14m": ModelShape(384, 4, 6, 2, 1024, 16_000, 1024),
    "100m": ModelShape(768, 12, 12, 4, 2048, 32_000, 1024),
    # The one that llama.cpp's figures are of, and a Qwen 2 of half a billion.
    "303m": ModelShape(1024, 24, 16, 4, 2816, 32_000, 4096, sixteen_bits=True),
    "500m": ModelShape(896, 24, 14, 2, 4864, 151_936, 4096, sixteen_bits=True),
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter on disk."""

    name: str
    rank: int
    folder: Path


def ensure_model(shape: ModelShape, cache: Path) -> Path:
    """Return the folder of the model of ``shape``, made first if the cache has none."""
    sizes = {name: value for name, value in asdict(shape).items() if value is not False}
    key = hashlib.sha256(json.dumps([_RECIPE, sizes]).encode()).hexdigest()[:12]
    return _made_once(cache / key / "model", lambda folder: _make_model(shape, folder))


def ensure_adapters(model: Path, count: int, ranks: Sequence[int]) -> list[AdapterFolder]:
    """Return ``count`` all-linear adapters for ``model``; adapter i has rank ``ranks[i % n]``."""
    adapters = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        folder = model.parent / "adapters" / f"rank{rank}-seed{index}"
        adapters.append(AdapterFolder(f"adapter-{index:04d}", rank, folder))
    missing = [adapter for adapter in adapters if not adapter.folder.exists()]
    for rank in sorted({adapter.rank for adapter in missing}):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        stored = json.loads((model / "config.json").read_text()).get("dtype")
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(base, settings)
        for adapter in missing:
            if adapter.rank == rank:
                seed = int(adapter.folder.name.rpartition("seed")[2])
                _randomize_adapter(peft_model, rank, seed, stored == "bfloat16")
                _made_once(adapter.folder, lambda folder: _save_adapter(peft_model, folder))  # noqa: B023 - called at once
    return adapters


def _make_model(shape: ModelShape, folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise * _WEIGHT_GAIN / parameter.shape[-1] ** 0.5)
    if shape.sixteen_bits:
        model = model.bfloat16()
    model.save_pretrained(folder)
    build_tokenizer(shape.vocabulary).save_pretrained(folder)


def _randomize_adapter(model: PeftModel, rank: int, seed: int, sixteen_bits: bool) -> None:
    """Give A and B signed, non-zero values such that scaling·BA is a fixed share of W."""
    generator = torch.Generator().manual_seed(seed)
    scaling = 2.0
    b_size = _ADAPTER_STRENGTH * _WEIGHT_GAIN / (scaling * rank**0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                size = parameter.shape[1] ** -0.5
            elif ".lora_B." in name:
                size = b_size
            else:
                continue
            values = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.bfloat16() if sixteen_bits else values)


def _save_adapter(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``make`` if it is not there; never seen half-written."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        make(temporary)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
