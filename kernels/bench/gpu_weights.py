"""Random 4-bit weights with double quantization, without quantizing anything."""

from __future__ import annotations

import torch

from manylora_kernels import NF4Weight
from manylora_kernels.nf4_pieces import NF4_CODE


def random_nf4(shape: tuple[int, int], device: torch.device) -> NF4Weight:
    """Return a weight whose rows have about unit length, on ``device``."""
    rows, columns = shape
    blocks = -(-rows * columns // 64)
    return NF4Weight(
        packed=torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device=device),
        code=torch.tensor(NF4_CODE, device=device),
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        shape=shape,
        block_size=64,
        absmax_code=torch.linspace(-1, 1, 256, device=device),
        absmax_scale=torch.full((-(-blocks // 256),), 0.5 / columns**0.5, device=device),
        absmax_offset=2.0 / columns**0.5,
    )


def copy_of(weight: NF4Weight) -> NF4Weight:
    """Return the same weight in memory of its own."""
    tensors = [tensor.clone() for tensor in weight.tensors]
    return NF4Weight.from_parts(tensors, weight.form, weight.absmax_offset, weight.shape[1])
