"""``nf4_linear`` by the native library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from manylora_kernels.backends import register
from manylora_kernels.native.binding import load
from manylora_kernels.nf4 import Form
from manylora_kernels.reference.linear import nf4_linear_compiled
from manylora_kernels.tiles import PANEL_ROWS, segment_of


class NF4Matrix(ctypes.Structure):
    """``Nf4Matrix`` of src/nf4.h."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("code", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("absmax_code", ctypes.c_void_p),
        ("absmax_scale", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("segment", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("absmax_offset", ctypes.c_float),
    )


_library = load()
_nf4_linear = _library.function(
    "manylora_nf4_linear",
    ctypes.POINTER(NF4Matrix),
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
)


# Structure, x, tokens, bias or None, y; returns a status.
Call = Callable[[NF4Matrix, int, int, "int | None", int], int]


@register("nf4_linear", "native")
def nf4_linear_native(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.nf4_linear``. Sums in float32, in an order that depends on nothing but the row.

    A weight that is not tiled (``tiles.tile`` says which cannot be), or not on the CPU, is
    computed by bitsandbytes' operator or the reference.
    """
    return product(_call, x, weight, form, absmax_offset, bias)


def product(
    call: Call,
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute ``nf4_linear`` by a function of the library, or elsewhere what it cannot take."""
    whole = Form(*form)
    if not whole.tiled or not x.is_cpu:
        return nf4_linear_compiled(x, weight, form, absmax_offset, bias)
    tokens, columns = x.shape
    matrix = nf4_matrix(whole, columns, absmax_offset, *[tensor.data_ptr() for tensor in weight])
    out = whole.out_features
    stride = -(-out // PANEL_ROWS) * PANEL_ROWS
    y = torch.empty((tokens, stride), dtype=torch.float32)
    rows = _plain_float(x)
    shift = None if bias is None else _plain_float(bias)
    if call(
        matrix,
        rows.data_ptr(),
        tokens,
        None if shift is None else shift.data_ptr(),
        y.data_ptr(),
    ):
        raise MemoryError("native nf4_linear: no memory for its scratch")
    if stride != out:
        y = y[:, :out].contiguous()
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _call(matrix: NF4Matrix, x: int, tokens: int, bias: int | None, y: int) -> int:
    return int(_nf4_linear(matrix, x, tokens, bias, y, _library.isa_number, _library.threads))


@functools.lru_cache(maxsize=8192)
def nf4_matrix(
    form: Form,
    columns: int,
    absmax_offset: float,
    tiles: int,
    code: int,
    absmax: int,
    absmax_code: int | None = None,
    absmax_scale: int | None = None,
) -> NF4Matrix:
    """Put addresses and numbers into a structure; a function of nothing but its arguments."""
    segment = segment_of(columns, form.block_size)
    assert segment is not None
    return NF4Matrix(
        tiles,
        code,
        absmax,
        absmax_code,
        absmax_scale,
        form.out_features,
        columns,
        segment,
        form.block_size * form.absmax_block_size,
        absmax_offset,
    )


def _plain_float(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
