"""A 4-bit weight rearranged for SIMD kernels, in the same number of bytes.

Sixteen rows of ``W`` form a panel (the last one padded with zeros), eight neighbouring columns of a
panel a tile of 64 bytes: four bytes of row 0, four of row 1, and so on, each byte as it was. One
load brings sixteen rows' weights side by side, and tiles follow one another along the columns, so
a kernel streams a panel and every lane sums one row.

The block maxima are repeated so that no block straddles rows or tiles, one byte (or float) a
segment of ``gcd(in, block_size)`` columns, at most 128: ``absmax [panels, in / segment, 16]``.
For blocks of 64 and rows of a multiple of 64 weights that is one for each block, as before.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from manylora_kernels.nf4 import NF4Weight

PANEL_ROWS = 16
TILE_COLUMNS = 8
MAX_SEGMENT = 128
_TILE_BYTES = PANEL_ROWS * TILE_COLUMNS // 2


def segment_of(in_features: int, block_size: int) -> int | None:
    """Return how many columns share a block maximum once tiled; ``None``: it cannot be tiled.

    That is where a block ends inside a tile (rows of 100 weights, for one).
    """
    common = math.gcd(in_features, block_size)
    if common % TILE_COLUMNS:
        return None
    return math.gcd(common, MAX_SEGMENT)


def tile(weight: NF4Weight) -> NF4Weight | None:
    """Return ``weight`` tiled.

    ``None`` where ``segment_of`` says that it cannot be, or the tensors are of other types than
    ``NF4Weight`` says: kernels read addresses.
    """
    out, columns = weight.shape
    segment = segment_of(columns, weight.block_size)
    wanted: tuple[torch.dtype, ...] = (
        torch.uint8,
        torch.float32,
        torch.uint8,
        torch.float32,
        torch.float32,
    )
    if len(weight.tensors) == 3:
        wanted = (torch.uint8, torch.float32, torch.float32)
    types = tuple(tensor.dtype for tensor in weight.tensors)
    if segment is None or weight.tiled or types != wanted:
        return None
    panels = -(-out // PANEL_ROWS)
    rows = weight.packed.reshape(-1)[: out * columns // 2].view(out, columns // 2)
    packed = _padded(rows, panels * PANEL_ROWS)
    packed = packed.view(panels, PANEL_ROWS, columns // TILE_COLUMNS, TILE_COLUMNS // 2)
    packed = packed.transpose(1, 2).contiguous()
    absmax = weight.absmax.reshape(-1).repeat_interleave(weight.block_size // segment)
    absmax = absmax[: out * columns // segment].view(out, columns // segment)
    absmax = _padded(absmax, panels * PANEL_ROWS).view(panels, PANEL_ROWS, columns // segment)
    return replace(
        weight,
        packed=packed.view(panels, columns // TILE_COLUMNS, _TILE_BYTES),
        code=weight.code.contiguous(),
        absmax=absmax.transpose(1, 2).contiguous(),
        tiled=True,
    )


def untile(weight: NF4Weight) -> NF4Weight:
    """Return a tiled weight in bitsandbytes' layout, bit for bit."""
    out, columns = weight.shape
    segment = segment_of(columns, weight.block_size)
    assert weight.tiled
    assert segment is not None
    packed = weight.packed.reshape(
        -1, columns // TILE_COLUMNS, PANEL_ROWS, TILE_COLUMNS // 2
    ).transpose(1, 2)
    absmax = weight.absmax.reshape(-1, columns // segment, PANEL_ROWS).transpose(1, 2)
    absmax = absmax.reshape(-1)[: out * columns // segment]
    return replace(
        weight,
        packed=packed.reshape(-1)[: out * columns // 2],
        absmax=absmax[:: weight.block_size // segment].contiguous(),
        tiled=False,
    )


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    if rows.shape[0] == count:
        return rows
    padding = rows.new_zeros(count - rows.shape[0], rows.shape[1])
    return torch.cat((rows, padding))
