"""Random 4-bit weights with double quantization, without quantizing anything."""

from __future__ import annotations

import torch

from manylora_kernels import NF4Weight

# The code book of QLoRA (arXiv:2305.14314), appendix E.
_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def random_nf4(shape: tuple[int, int], device: torch.device) -> NF4Weight:
    """Return a weight whose rows have about unit length, on ``device``."""
    rows, columns = shape
    blocks = -(-rows * columns // 64)
    return NF4Weight(
        packed=torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device=device),
        code=torch.tensor(_NF4, device=device),
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
