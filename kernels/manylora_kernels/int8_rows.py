"""A dense weight in one byte each, with a scale for every row.

``W[r] = scale[r] * q[r]`` with ``q`` in -127 .. 127 and ``scale[r] = max |W[r]| / 127``.

Sixteen rows of ``W`` form a panel (the last one padded with zeros), two neighbouring columns of a
panel a tile of 32 bytes: the first column's 16 rows, then the second's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manylora_kernels.half import PANEL_ROWS

_LARGEST = 127


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """``W [out, in]`` as int8 tiles ``[ceil(out / 16), ceil(in / 2), 2, 16]`` and float32
    ``scale [out]``."""

    tiles: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Memory of the tiles and the scales."""
        return self.tiles.numel() + 4 * self.scale.numel()

    def widen(self) -> torch.Tensor:
        """Return ``W [out, in]`` in float32 as a new tensor."""
        return widen(self.tiles, self.scale, self.shape[1])


def blank(out: int, columns: int, device: torch.device) -> Int8Weight:
    """Return a weight of zeros for ``store_rows`` to fill."""
    panels, pairs = -(-out // PANEL_ROWS), -(-columns // 2)
    tiles = torch.zeros(panels, pairs, 2, PANEL_ROWS, dtype=torch.int8, device=device)
    return Int8Weight(tiles, torch.zeros(out, device=device), (out, columns))


def store_rows(weight: Int8Weight, start: int, rows: torch.Tensor) -> torch.Tensor:
    """Round ``rows [n, in]``, let them be ``W[start:start + n]``, and return what they are now.

    ``start`` is a multiple of ``PANEL_ROWS``, and so is ``n`` unless they are the last.
    """
    count, columns = rows.shape
    scale = rows.abs().amax(1) / _LARGEST
    quantized = torch.round(rows / torch.where(scale > 0, scale, 1.0)[:, None])
    panel = start // PANEL_ROWS
    into = weight.tiles[panel : panel + -(-count // PANEL_ROWS)]
    padded = rows.new_zeros(into.shape[0] * PANEL_ROWS, 2 * weight.tiles.shape[1])
    padded[:count, :columns] = quantized
    by_row = padded.to(torch.int8).view(-1, PANEL_ROWS, weight.tiles.shape[1], 2)
    into.copy_(by_row.permute(0, 2, 3, 1))
    weight.scale[start : start + count] = scale
    return quantized * scale[:, None]


def widen(tiles: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the ``[out, columns]`` matrix in ``tiles``, in float32."""
    rows = tiles.permute(0, 3, 1, 2).reshape(tiles.shape[0] * PANEL_ROWS, -1)
    return rows[: scale.shape[0], :columns].float() * scale[:, None]
