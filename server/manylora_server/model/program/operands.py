"""Tensors of a recording as operands of native instructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora_kernels.native.program import MAX_DIMS, AffineInt, Operand, Place
from manylora_server.model.program.affine import Affine
from manylora_server.model.program.arena import ArenaPlan
from manylora_server.model.program.recorder import Constant
from manylora_server.model.program.symbolic import SymbolicRef

ONE = Affine(1)
ZERO = Affine(0)


class NotNativeError(Exception):
    """There is no native instruction for this; torch computes it between two native runs."""


def shape_of(tensor: SymbolicRef | Constant) -> tuple[Affine, ...]:
    """Return a tensor's sizes."""
    if isinstance(tensor, Constant):
        return tuple(Affine(size) for size in tensor.tensor.shape)
    return tensor.size


def operand(
    tensor: SymbolicRef | Constant, plan: ArenaPlan, size: Sequence[Affine] | None = None
) -> Operand:
    """Return ``tensor`` as an operand, broadcast to ``size`` where that is given.

    Raises ``NotNativeError`` for what is not float32 or has too many dimensions.
    """
    own = shape_of(tensor)
    wanted = own if size is None else tuple(size)
    if len(wanted) > MAX_DIMS or len(own) > len(wanted):
        raise NotNativeError
    result = Operand()
    if isinstance(tensor, Constant):
        source = tensor.tensor
        if source.dtype is not torch.float32 or source.device.type != "cpu":
            raise NotNativeError
        result.place, result.base = Place.ADDRESS, source.data_ptr()
        strides = [Affine(stride) for stride in source.stride()]
    else:
        if tensor.dtype is not torch.float32:
            raise NotNativeError
        result.place, result.base = Place.SLOT, plan.slot_of[tensor.buffer]
        result.offset = affine(tensor.offset)
        strides = list(tensor.stride)
    missing = len(wanted) - len(own)
    for index, (have, stride) in enumerate(zip(own, strides, strict=True), missing):
        if have == wanted[index]:
            result.stride[index] = affine(stride)
        elif have != ONE:
            raise NotNativeError
    return result


def affine(value: Affine) -> AffineInt:
    """Return ``value`` as the library takes it."""
    return AffineInt(value.constant, value.per_token, value.per_output)


def rows_of(tensor: SymbolicRef) -> tuple[Affine, int]:
    """Return the number of rows of a dense tensor, all its dimensions but the last, and its width.

    Raises ``NotNativeError`` where the rows are not one dense matrix.
    """
    if tensor.dtype is not torch.float32 or not tensor.size[-1].is_constant:
        raise NotNativeError
    width = tensor.size[-1].constant
    rows = ONE
    expected = Affine(width)
    for size, stride in zip(reversed(tensor.size[:-1]), reversed(tensor.stride[:-1]), strict=True):
        if size == ONE:
            continue
        if rows != ONE or stride != expected:
            raise NotNativeError
        rows = size
    if tensor.stride[-1] != ONE and width != 1:
        raise NotNativeError
    return rows, width
