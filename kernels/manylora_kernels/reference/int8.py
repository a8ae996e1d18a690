"""4-bit linear layers with activations and the code book rounded to eight bits.

For a row ``x [in]`` and segments of the columns (``tiles.segment_of``: a quantization block, or the
part of it in the row), with ``round`` to even and every operation in float32 rounded by itself::

    a_i = max |x| over segment i
    q   = round(x * (127 / a_i)), 0 where a_i < 2^-100
    n_i[r] = sum of round(127 code) * q over segment i, exact
    y[r]   = (((0 + (n_0 m_0) c_0) + (n_1 m_1) c_1) + ...) + bias[r],   c_i = a_i / 127^2

``m_i[r]`` is the block's maximum. A segment that is not finite has ``c_i = NaN``, so its row of
``y`` is NaN. This is the oracle of the backend ``native-int8``, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora_kernels.backends import register
from manylora_kernels.nf4 import NF4Weight
from manylora_kernels.reference.linear import nf4_linear
from manylora_kernels.tiles import segment_of, untile

REFERENCE_INT8 = "reference-int8"
STEPS = 127
_LEAST = 2.0**-100


@register("nf4_linear", REFERENCE_INT8)
def nf4_linear_int8(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See the module docstring; ``x [T, in]``. Weights that cannot be tiled stay in float."""
    whole = NF4Weight.from_parts(weight, form, absmax_offset, x.shape[1])
    segment = segment_of(whole.shape[1], whole.block_size)
    if segment is None:
        return nf4_linear(x, weight, form, absmax_offset, bias)
    integers, maxima = _rounded_weight(untile(whole) if whole.tiled else whole, segment)
    q, scale = quantize_activations(x.float(), segment)
    y = x.new_zeros((x.shape[0], whole.shape[0]), dtype=torch.float32)
    for index in range(maxima.shape[1]):
        # Float64 holds these sums exactly, whatever the order of a matrix product.
        sums = (q[:, index].double() @ integers[:, index].double().t()).float()
        y = y + (sums * maxima[:, index]) * scale[:, index, None]
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def quantize_activations(x: torch.Tensor, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``q [T, segments, segment]`` and ``c [T, segments]`` of float32 ``x [T, in]``."""
    parts = x.reshape(x.shape[0], x.shape[1] // segment, segment)
    largest = parts.abs().amax(-1)
    finite = largest.isfinite()
    # Not `STEPS / largest`, which torch computes as a reciprocal and a product.
    inverse = torch.full_like(largest, STEPS) / largest
    usable = finite & (largest >= _LEAST)
    q = torch.where(usable[..., None], torch.round(parts * inverse[..., None]), 0.0)
    scale = torch.where(finite, largest * (1.0 / STEPS**2), float("nan"))
    return q, scale


def _rounded_weight(weight: NF4Weight, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return integers ``[out, segments, segment]`` and block maxima ``[out, segments]``."""
    out, columns = weight.shape
    packed = weight.packed.reshape(-1)
    indices = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[: out * columns].int()
    book = torch.round(weight.code.float() * STEPS)
    maxima = weight.block_maxima().repeat_interleave(weight.block_size // segment)
    segments = columns // segment
    return (
        book[indices].view(out, segments, segment),
        maxima[: out * segments].view(out, segments),
    )
