"""A dense weight in half of its bytes: bfloat16 or float16, tiled for SIMD kernels.

Most checkpoints are bfloat16 or float16. A float32 weight that was widened from one of them holds
nothing that the narrow one does not, so keeping the narrow one changes no result.

Sixteen rows of ``W`` form a panel (the last one padded with zeros), two neighbouring columns of a
panel a tile of 64 bytes. bfloat16: row 0's two weights, row 1's, and so on, so that a shift or a
mask widens one column of 16 rows. float16: the first column's 16 rows, then the second's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

PANEL_ROWS = 16
DTYPES = (torch.bfloat16, torch.float16)
# Rows that are widened or narrowed at once, to need little memory beside the weight.
_ROWS_AT_ONCE = 256 * PANEL_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class HalfWeight:
    """``W [out, in]`` as tiles ``[ceil(out / 16), ceil(in / 2), 2 * 16]`` of bfloat16 or float16.

    The last two dimensions of a tile are (row, column) for bfloat16, (column, row) for float16.
    """

    tiles: torch.Tensor
    shape: tuple[int, int]

    def widen(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return ``W [out, in]`` as a new tensor."""
        return widen(self.tiles, *self.shape, dtype)


def halve(weight: torch.Tensor) -> HalfWeight | None:
    """Return a float32 ``weight [out, in]`` in half of its bytes; ``None`` if that loses anything.

    Nothing is lost where every value is one of bfloat16, or every value one of float16.
    """
    for dtype in DTYPES:
        if all(torch.equal(rows.to(dtype).float(), rows) for rows in _pieces(weight)):
            return narrow(weight, dtype)
    return None


def narrow(weight: torch.Tensor, dtype: torch.dtype) -> HalfWeight:
    """Return ``weight [out, in]``, rounded to ``dtype``, tiled."""
    half = blank(weight.shape[0], weight.shape[1], dtype, weight.device)
    for start, rows in zip(range(0, weight.shape[0], _ROWS_AT_ONCE), _pieces(weight), strict=True):
        store_rows(half, start, rows)
    return half


def blank(out: int, columns: int, dtype: torch.dtype, device: torch.device) -> HalfWeight:
    """Return a weight of zeros for ``store_rows`` to fill."""
    panels, pairs = -(-out // PANEL_ROWS), -(-columns // 2)
    tiles = torch.zeros(panels, pairs, 2 * PANEL_ROWS, dtype=dtype, device=device)
    return HalfWeight(tiles, (out, columns))


def store_rows(weight: HalfWeight, start: int, rows: torch.Tensor) -> None:
    """Round ``rows [n, in]`` and let them be ``W[start:start + n]``.

    ``start`` is a multiple of ``PANEL_ROWS``, and so is ``n`` unless they are the last.
    """
    panel, count = start // PANEL_ROWS, rows.shape[0]
    pairs = weight.tiles.shape[1]
    into = weight.tiles[panel : panel + -(-count // PANEL_ROWS)]
    padded = rows.new_zeros(into.shape[0] * PANEL_ROWS, 2 * pairs)
    padded[:count, : weight.shape[1]] = rows
    chunk = padded.to(into.dtype).view(-1, PANEL_ROWS, pairs, 2)
    _by_row(into).copy_(chunk)


def read_rows(weight: HalfWeight, start: int, stop: int) -> torch.Tensor:
    """Return ``W[start:stop]`` in float32; ``start`` is a multiple of ``PANEL_ROWS``."""
    panels = weight.tiles[start // PANEL_ROWS : -(-stop // PANEL_ROWS)]
    return widen(panels, stop - start, weight.shape[1], torch.float32)


def widen(tiles: torch.Tensor, out: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the ``[out, columns]`` matrix in ``tiles`` as ``dtype``."""
    dense = torch.empty(out, columns, dtype=dtype, device=tiles.device)
    for start in range(0, out, _ROWS_AT_ONCE):
        panels = tiles[start // PANEL_ROWS : (start + _ROWS_AT_ONCE) // PANEL_ROWS]
        rows = _by_row(panels).reshape(panels.shape[0] * PANEL_ROWS, -1)
        into = dense[start : start + _ROWS_AT_ONCE]
        into.copy_(rows[: into.shape[0], :columns])
    return dense


def rows(tiles: torch.Tensor, columns: int, index: torch.Tensor) -> torch.Tensor:
    """Return rows ``index [n]`` of the matrix in ``tiles`` in float32, ``[n, columns]``."""
    panel, row = index // PANEL_ROWS, index % PANEL_ROWS
    if tiles.dtype == torch.bfloat16:
        # Both columns of a pair at once: a third of the time.
        found = tiles.view(torch.int32)[panel, :, row].view(torch.bfloat16)
    else:
        found = _by_row(tiles)[panel, row].flatten(1)
    return found[:, :columns].float()


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        yield weight[start : start + _ROWS_AT_ONCE]


def _by_row(tiles: torch.Tensor) -> torch.Tensor:
    """View tiles as ``[panels, row of the panel, pair of columns, column of the pair]``."""
    panels, pairs, _ = tiles.shape
    if tiles.dtype == torch.bfloat16:
        return tiles.view(panels, pairs, PANEL_ROWS, 2).permute(0, 2, 1, 3)
    return tiles.view(panels, pairs, 2, PANEL_ROWS).permute(0, 3, 1, 2)
