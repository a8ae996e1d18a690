"""4-bit linear layers in plain PyTorch, and with bitsandbytes' own dequantization.

``bitsandbytes`` here is the operator namespace that the package registers with torch when the
server imports it; nothing is imported from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from manylora_kernels.backends import REFERENCE, register
from manylora_kernels.nf4 import NF4Weight

BITSANDBYTES = "bitsandbytes"


@register("nf4_linear", REFERENCE)
def nf4_linear(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.nf4_linear``: materialises ``W`` and multiplies."""
    whole = NF4Weight.from_parts(weight, form, absmax_offset, x.shape[1])
    return F.linear(x, whole.dequantize(x.dtype), bias)


@register("nf4_linear", BITSANDBYTES)
def nf4_linear_bitsandbytes(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference, with ``W`` unpacked by bitsandbytes' compiled operator.

    The CPU operator of bitsandbytes 0.50 is wrong where blocks straddle rows (a row of 96 weights
    in blocks of 64, for one), and knows no tiles, so such weights are unpacked by the reference.
    """
    whole = NF4Weight.from_parts(weight, form, absmax_offset, x.shape[1])
    if whole.tiled or whole.shape[1] % whole.block_size:
        dense = whole.dequantize(x.dtype)
    else:
        dense = torch.ops.bitsandbytes.dequantize_4bit(
            whole.packed,
            whole.block_maxima(),
            whole.block_size,
            whole.quant_type,
            whole.shape,
            x.dtype,
        )
    return F.linear(x, dense, bias)


def nf4_linear_compiled(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """By bitsandbytes where it has registered its operators, else by the reference."""
    registered = hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
    implementation = nf4_linear_bitsandbytes if registered else nf4_linear
    return implementation(x, weight, form, absmax_offset, bias)


@register("packed_linear", REFERENCE)
def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """See ``ops.packed_linear``."""
    # oneDNN's path for one or two rows is slower than the one for four.
    padding = max(0, 4 - x.shape[0])
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y[: 4 - padding] if padding else y
