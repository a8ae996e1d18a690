"""A 4-bit weight in bitsandbytes' own packed layout, as plain tensors.

A matrix ``W [out, in]`` is flattened row by row and cut into blocks of ``block_size`` weights.
Weight ``i`` is ``code[q_i] * absmax[i // block_size]``, with two 4-bit indices ``q`` to a byte,
the first in the high half. With double quantization the block maxima are themselves stored as
bytes, in groups of ``absmax_block_size``::

    absmax[j] = absmax_code[absmax_q[j]] * absmax_scale[j // absmax_block_size] + absmax_offset

Kernels may hold the same bytes in another order (``tiles``).

Reference: T. Dettmers et al., QLoRA (arXiv:2305.14314), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

QUANT_TYPES = ("nf4", "fp4")


class Form(NamedTuple):
    """The integers that say how to read a weight's tensors; ``kind`` indexes ``QUANT_TYPES``."""

    out_features: int
    block_size: int
    absmax_block_size: int
    kind: int
    tiled: int


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """See the module docstring.

    ``packed``: uint8, ``out * in / 2`` elements of any shape. ``code``: float32 ``[16]`` (NF4's or
    FP4's). ``absmax``: uint8 ``[blocks]`` when ``absmax_code`` (float32 ``[256]``) and
    ``absmax_scale`` (float32) are given, else float32 ``[blocks]``.
    ``tiled``: ``packed`` and ``absmax`` are in the order of ``tiles``.
    """

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    block_size: int
    quant_type: str = "nf4"
    absmax_code: torch.Tensor | None = None
    absmax_scale: torch.Tensor | None = None
    absmax_offset: float = 0.0
    absmax_block_size: int = 256
    tiled: bool = False

    @classmethod
    def from_parts(
        cls, tensors: Sequence[torch.Tensor], form: Sequence[int], offset: float, columns: int
    ) -> NF4Weight:
        """Return the weight with these ``tensors``, ``form``, ``absmax_offset`` and ``in``."""
        packed, code, absmax, *nested = tensors
        parts = Form(*form)
        return cls(
            packed=packed,
            code=code,
            absmax=absmax,
            shape=(parts.out_features, columns),
            block_size=parts.block_size,
            quant_type=QUANT_TYPES[parts.kind],
            absmax_code=nested[0] if nested else None,
            absmax_scale=nested[1] if nested else None,
            absmax_offset=offset,
            absmax_block_size=parts.absmax_block_size,
            tiled=bool(parts.tiled),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """``packed``, ``code``, ``absmax`` and, where nested, ``absmax_code``, ``absmax_scale``."""
        if self.absmax_code is None or self.absmax_scale is None:
            return [self.packed, self.code, self.absmax]
        return [self.packed, self.code, self.absmax, self.absmax_code, self.absmax_scale]

    @property
    def form(self) -> Form:
        """See ``Form``."""
        kind = QUANT_TYPES.index(self.quant_type)
        return Form(self.shape[0], self.block_size, self.absmax_block_size, kind, int(self.tiled))

    @property
    def bytes(self) -> int:
        """Memory of the packed weight with its scales, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def block_maxima(self) -> torch.Tensor:
        """Return the float32 ``absmax [blocks]``, its double quantization undone.

        Of a weight that is not tiled.
        """
        if self.absmax_code is None or self.absmax_scale is None:
            return self.absmax.float()
        first = self.absmax_code[self.absmax.reshape(-1).int()]
        if first.numel() % self.absmax_block_size == 0:
            groups = first.view(-1, self.absmax_block_size)
            return (groups * self.absmax_scale[:, None]).view(-1).add_(self.absmax_offset)
        scales = self.absmax_scale.repeat_interleave(self.absmax_block_size)[: first.numel()]
        return first.mul_(scales).add_(self.absmax_offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return ``W [out, in]`` in ``dtype``; the products are computed in float32."""
        if self.tiled:
            from manylora_kernels.tiles import untile

            return untile(self).dequantize(dtype)
        packed = self.packed.reshape(-1)
        indices = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1).int()
        maxima = self.block_maxima().repeat_interleave(self.block_size)[: indices.numel()]
        weight = self.code.float()[indices] * maxima
        count = self.shape[0] * self.shape[1]
        return weight[:count].reshape(self.shape).to(dtype)
