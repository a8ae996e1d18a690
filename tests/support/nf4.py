"""4-bit weights made by bitsandbytes, and what they stand for, one weight at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import torch

from manylora_kernels import NF4Weight


def quantize(
    shape: tuple[int, int], kind: str = "nf4", *, double: bool = True, block_size: int = 64
) -> tuple[NF4Weight, Any]:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    packed, state = bnb.quantize_4bit(
        weight, quant_type=kind, compress_statistics=double, blocksize=block_size
    )
    nested = state.state2 if double else None
    ours = NF4Weight(
        packed=packed,
        code=state.code,
        absmax=state.absmax,
        shape=shape,
        block_size=block_size,
        quant_type=kind,
        absmax_code=nested.code if nested else None,
        absmax_scale=nested.absmax if nested else None,
        absmax_offset=float(state.offset) if nested else 0.0,
        absmax_block_size=nested.blocksize if nested else 256,
    )
    return ours, state


@cache
def unpacked(shape: tuple[int, int]) -> torch.Tensor:
    """The weight that ``quantize(shape)`` returns, unpacked."""
    return unpack(quantize(shape)[0])


def unpack(weight: NF4Weight) -> torch.Tensor:
    """The module docstring's equations, one weight at a time, in float64."""
    packed, code = weight.packed.reshape(-1).tolist(), weight.code.double().tolist()
    absmax = weight.absmax.tolist()
    if weight.absmax_code is not None and weight.absmax_scale is not None:
        codes, scales = weight.absmax_code.tolist(), weight.absmax_scale.tolist()
        absmax = [
            codes[q] * scales[j // weight.absmax_block_size] + weight.absmax_offset
            for j, q in enumerate(absmax)
        ]
    rows, columns = weight.shape
    flat = []
    for index in range(rows * columns):
        byte = packed[index // 2]
        nibble = byte >> 4 if index % 2 == 0 else byte & 15
        flat.append(code[nibble] * absmax[index // weight.block_size])
    return torch.tensor(flat, dtype=torch.float64).view(rows, columns)
