"""4-bit linear layers in plain PyTorch, and with bitsandbytes' own dequantization.

``bitsandbytes`` here is the operator namespace that the package registers with torch when the
server imports it; nothing is imported from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from manylora_kernels.backends import REFERENCE, register
from manylora_kernels.nf4 import NF4Weight

BITSANDBYTES = "bitsandbytes"


def _weight(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_scale: torch.Tensor | None,
    absmax_offset: float,
    absmax_block_size: int,
    shape: tuple[int, int],
    block_size: int,
    quant_type: str,
) -> NF4Weight:
    return NF4Weight(
        packed=packed,
        code=code,
        absmax=absmax,
        shape=shape,
        block_size=block_size,
        quant_type=quant_type,
        absmax_code=absmax_code,
        absmax_scale=absmax_scale,
        absmax_offset=absmax_offset,
        absmax_block_size=absmax_block_size,
    )


@register("nf4_linear", REFERENCE)
def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_scale: torch.Tensor | None,
    absmax_offset: float,
    absmax_block_size: int,
    out_features: int,
    block_size: int,
    quant_type: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.nf4_linear``: materialises ``W`` and multiplies."""
    weight = _weight(
        packed,
        code,
        absmax,
        absmax_code,
        absmax_scale,
        absmax_offset,
        absmax_block_size,
        (out_features, x.shape[1]),
        block_size,
        quant_type,
    )
    return F.linear(x, weight.dequantize(x.dtype), bias)


@register("nf4_linear", BITSANDBYTES)
def nf4_linear_bitsandbytes(
    x: torch.Tensor,
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_scale: torch.Tensor | None,
    absmax_offset: float,
    absmax_block_size: int,
    out_features: int,
    block_size: int,
    quant_type: str,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference, with ``W`` unpacked by bitsandbytes' compiled operator.

    The CPU operator of bitsandbytes 0.50 is wrong where blocks straddle rows (a row of 96 weights
    in blocks of 64, for one), so such weights are unpacked by the reference.
    """
    shape = (out_features, x.shape[1])
    weight = _weight(
        packed,
        code,
        absmax,
        absmax_code,
        absmax_scale,
        absmax_offset,
        absmax_block_size,
        shape,
        block_size,
        quant_type,
    )
    if shape[1] % block_size:
        dense = weight.dequantize(x.dtype)
    else:
        dense = torch.ops.bitsandbytes.dequantize_4bit(
            packed, weight.block_maxima(), block_size, quant_type, shape, x.dtype
        )
    return F.linear(x, dense, bias)
