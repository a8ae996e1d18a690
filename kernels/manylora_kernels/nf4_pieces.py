"""A 4-bit weight by ranges of rows: to read a part of one, and to make one part by part.

What is made here has plain block maxima in float32 (4.5 bits a weight): their double quantization
needs the mean of all of them, which no part knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from manylora_kernels.nf4 import NF4Weight
from manylora_kernels.tiles import PANEL_ROWS, TILE_COLUMNS, segment_of

# T. Dettmers et al., QLoRA (arXiv:2305.14314), appendix E.
NF4_CODE = (
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
)
BLOCK_SIZE = 64


def read_rows(weight: NF4Weight, start: int, stop: int) -> torch.Tensor:
    """Return rows ``[start, stop)`` of ``W`` in float32: the bits that ``dequantize`` gives.

    ``start`` is a multiple of ``PANEL_ROWS``, so that it begins a panel, and a byte.
    """
    _check(start)
    out, columns = weight.shape
    stop = min(stop, out)
    # Both weights of each byte.
    code = weight.code.float()
    pairs = torch.cartesian_prod(code, code)
    if not weight.tiled:
        first, last = start * columns, stop * columns
        packed = weight.packed.reshape(-1)[first // 2 : -(-last // 2)]
        values = torch.nn.functional.embedding(packed.int(), pairs).view(-1)[: last - first]
        block = first // weight.block_size
        numbers = torch.arange(block, -(-last // weight.block_size), device=packed.device)
        maxima = _maxima(weight, weight.absmax.reshape(-1)[numbers], numbers)
        maxima = maxima.repeat_interleave(weight.block_size)[first - block * weight.block_size :]
        return (values * maxima[: last - first]).view(stop - start, columns)
    segment = segment_of(columns, weight.block_size)
    assert segment is not None
    panels = slice(start // PANEL_ROWS, -(-stop // PANEL_ROWS))
    packed = weight.packed[panels].view(-1, columns // TILE_COLUMNS, PANEL_ROWS, TILE_COLUMNS // 2)
    values = torch.nn.functional.embedding(packed.transpose(1, 2).int(), pairs)
    rows = torch.arange(start, start + values.shape[0] * PANEL_ROWS, device=packed.device)
    segments = torch.arange(columns // segment, device=packed.device)
    # The last panel's padding is no block; any number does.
    numbers = (rows[:, None] * columns + segments * segment) // weight.block_size
    numbers = numbers.clamp_(max=out * columns // weight.block_size - 1)
    stored = weight.absmax[panels].transpose(1, 2).reshape(numbers.shape)
    maxima = _maxima(weight, stored, numbers)
    whole = values.view(-1, columns // segment, segment) * maxima[:, :, None]
    return whole.view(-1, columns)[: stop - start]


def quantize_rows(rows: torch.Tensor, block_size: int = BLOCK_SIZE) -> NF4Weight:
    """Return float32 ``rows [n, in]`` as NF4, each weight as the nearest value of the code book."""
    flat = rows.reshape(-1)
    padding = -flat.numel() % block_size
    if padding:
        flat = torch.cat((flat, flat.new_zeros(padding)))
    blocks = flat.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    code = torch.tensor(NF4_CODE, device=rows.device)
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]
    # Counting the thresholds below is half the time of a binary search.
    indices = torch.zeros(scaled.shape, dtype=torch.uint8, device=rows.device)
    for threshold in ((code[1:] + code[:-1]) / 2).tolist():
        indices += scaled > threshold
    nibbles = indices.view(-1, 2)
    return NF4Weight(
        packed=(nibbles[:, 0] << 4) | nibbles[:, 1],
        code=code,
        absmax=absmax,
        shape=(rows.shape[0], rows.shape[1]),
        block_size=block_size,
    )


def join_rows(parts: Sequence[NF4Weight]) -> NF4Weight:
    """Return the weight whose rows are those of ``parts``, one after another.

    All but the last have a multiple of ``PANEL_ROWS`` rows and, unless tiled, end with a block.
    """
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    return replace(
        first,
        packed=torch.cat([part.packed for part in parts]),
        absmax=torch.cat([part.absmax for part in parts]),
        shape=(rows, first.shape[1]),
    )


def _maxima(weight: NF4Weight, stored: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return float32 block maxima of the blocks ``numbers``, kept as ``stored``."""
    if weight.absmax_code is None or weight.absmax_scale is None:
        return stored.float()
    groups = torch.div(numbers, weight.absmax_block_size, rounding_mode="floor")
    first = weight.absmax_code[stored.int()]
    return first * weight.absmax_scale[groups] + weight.absmax_offset


def _check(start: int) -> None:
    if start % PANEL_ROWS:
        raise ValueError(f"start must be a multiple of {PANEL_ROWS}, got {start}")
