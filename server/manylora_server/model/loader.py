"""Loads the base: a folder or hub id to a model in memory, 4-bit or dense, ready for adapters."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from manylora_server.core.config import ModelConfig, Quantization
from manylora_server.core.errors import StartupError
from manylora_server.model import quantized_cache
from manylora_server.model.architectures import SUPPORTED_MODEL_TYPES
from manylora_server.model.experts import quantize_experts
from manylora_server.model.fingerprint import base_fingerprint
from manylora_server.model.layout import describe, module_specs
from manylora_server.model.nf4_linear import replace_4bit_linears
from manylora_server.model.packed_linear import can_pack, pack_linears
from manylora_store.compiler.canonical import BaseLayout

logger = logging.getLogger(__name__)

_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The base in memory. ``layout`` was taken before any module was wrapped."""

    model: Any
    layout: BaseLayout
    quantization: Quantization
    dtype: torch.dtype
    device: torch.device
    folder: Path
    max_positions: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def load_model(config: ModelConfig) -> LoadedModel:
    """Load ``config.model``. ``StartupError`` says what is wrong with it, where it cannot be."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    folder = resolve_folder(config.model)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(folder)
        model_type = raw.get("model_type")
        # Before transformers looks: its answer to a type it does not know is advice on pip.
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise StartupError(
                f"MODEL {config.model!r}: architecture {model_type!r} is not served. "
                f"Served are: {', '.join(sorted(SUPPORTED_MODEL_TYPES))}."
            )
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StartupError(f"MODEL {config.model!r}: {error}") from error
    try:
        model = _load_weights(config, hf_config, folder, dtype, device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StartupError(f"MODEL {config.model!r}: cannot be loaded: {error}") from error
    model.eval()
    model.requires_grad_(False)
    replaced = experts = 0
    # bitsandbytes takes a second to import; a dense base needs none of it.
    if "bitsandbytes" in sys.modules or config.quantization == "nf4":
        replaced = replace_4bit_linears(model, dtype)
        if replaced or config.quantization == "nf4":
            experts = quantize_experts(model)
    logger.info(
        "loaded %s (%s) on %s as %s: %d linear layers in 4 bits, %d expert layers in 4 bits",
        config.model,
        model_type,
        device,
        str(dtype).removeprefix("torch."),
        replaced,
        experts,
    )
    specs = module_specs(model)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    if can_pack(dtype, device):
        # Who asked for 4 bits asked for little memory: no second float32 copy of a tied head there.
        packed = pack_linears(model, copy_tied_head=not replaced)
        logger.info(
            "dense linear layers: %d in the checkpoint's 16 bits, %d in float32",
            packed.half,
            packed.full,
        )
    text = hf_config.get_text_config()
    return LoadedModel(
        model=model,
        layout=describe(model, specs, model_type, base_fingerprint(folder)),
        quantization="nf4" if replaced or experts else "none",
        dtype=dtype,
        device=device,
        folder=folder,
        max_positions=int(getattr(text, "max_position_embeddings", None) or 2048),
        vocab_size=vocab_size,
        eos_token_ids=_eos_token_ids(model),
    )


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch sees no CUDA device.", param="--device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of activations; ``auto`` is float32 on a CPU, else bfloat16 or float16."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32
    # Emulated bfloat16 is slower than float16.
    whole = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if whole else torch.float16


def resolve_folder(model: str) -> Path:
    """Return the local folder of ``model``, downloaded first if it is a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"MODEL {model!r}: the folder holds no config.json.")
        return path
    if path.exists() or model.startswith((".", "/", "~")):
        raise StartupError(f"MODEL {model!r}: no such folder.")
    try:
        return Path(snapshot_download(model, allow_patterns=_CHECKPOINT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartupError(
            f"MODEL {model!r}: no local folder of this name, and the hub cannot give it: {error}"
        ) from error


def _load_weights(
    config: ModelConfig, hf_config: Any, folder: Path, dtype: torch.dtype, device: torch.device
) -> Any:
    placed = {"device_map": {"": str(device)}, "dtype": dtype}
    stored = getattr(hf_config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if str(method) not in {"bitsandbytes", "bitsandbytes_4bit"}:
            raise StartupError(
                f"MODEL {config.model!r}: it is quantized by {method!s}; served are dense "
                "checkpoints and those that bitsandbytes quantized to 4 bits."
            )
        return AutoModelForCausalLM.from_pretrained(folder, **placed)
    if config.quantization == "none":
        return AutoModelForCausalLM.from_pretrained(folder, **placed)
    key = quantized_cache.cache_key(folder, str(dtype))
    if config.cache_dir is not None:
        cached = quantized_cache.cached_folder(config.cache_dir, key)
        if cached is not None:
            logger.info("using the quantized base cached in %s", cached)
            return AutoModelForCausalLM.from_pretrained(cached, **placed)
    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=recipe, **placed)
    if config.cache_dir is not None:
        quantized_cache.store(config.cache_dir, key, model)
    return model


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    for source in (model.generation_config, model.config):
        eos = getattr(source, "eos_token_id", None)
        if isinstance(eos, int):
            return (eos,)
        if eos:
            return tuple(int(token) for token in eos)
    return ()
