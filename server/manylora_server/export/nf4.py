"""A weight in bitsandbytes' serialised 4-bit form, as transformers stores and loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from manylora_store.export.tensor_files import TensorForm

_BLOCK = 64
_NESTED_BLOCK = 256
_STATE = "quant_state.bitsandbytes__nf4"
# The state is JSON whose length depends on a number in it; spaces behind JSON mean nothing.
_STATE_BYTES = 512


def forms(name: str, shape: tuple[int, ...]) -> dict[str, TensorForm]:
    """Return the tensors that the weight ``name [out, in]`` becomes."""
    count = shape[0] * shape[1]
    blocks = -(-count // _BLOCK)
    return {
        name: TensorForm(torch.uint8, (-(-count // 2), 1)),
        f"{name}.absmax": TensorForm(torch.uint8, (blocks,)),
        f"{name}.nested_absmax": TensorForm(torch.float32, (-(-blocks // _NESTED_BLOCK),)),
        f"{name}.nested_quant_map": TensorForm(torch.float32, (256,)),
        f"{name}.quant_map": TensorForm(torch.float32, (16,)),
        f"{name}.{_STATE}": TensorForm(torch.uint8, (_STATE_BYTES,)),
    }


def pack(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantize ``weight [out, in]`` and return the tensors of ``forms``.

    By bitsandbytes itself, which takes a second to import.
    """
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight, blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
    )
    parts = state.as_dict(packed=True)
    text = bytes(parts.pop(_STATE).tolist())
    assert len(text) <= _STATE_BYTES
    parts[_STATE] = torch.tensor(list(text.ljust(_STATE_BYTES)), dtype=torch.uint8)
    return {name: packed} | {f"{name}.{key}": value for key, value in parts.items()}


def quantization_config(dense: torch.dtype, skipped: tuple[str, ...]) -> Mapping[str, Any]:
    """Return what ``config.json`` says of such a checkpoint."""
    from transformers import BitsAndBytesConfig

    config: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dense,
        llm_int8_skip_modules=list(skipped),
    ).to_dict()
    return config
