"""``half_linear`` and ``int8_linear`` by the native library."""

from __future__ import annotations

import ctypes

import torch

from manylora_kernels.backends import register
from manylora_kernels.half import DTYPES
from manylora_kernels.native.binding import load
from manylora_kernels.reference import half as reference
from manylora_kernels.reference.int8_rows import int8_linear

# ``HalfKind`` of src/half.h, which numbers ``DTYPES`` and then this.
INT8_KIND = len(DTYPES)


class HalfJob(ctypes.Structure):
    """``HalfJob`` of src/half.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiles", "x", "bias", "y")),
        *(
            (name, ctypes.c_int64)
            for name in ("kind", "out_features", "in_features", "tokens", "x_stride")
        ),
        ("scale", ctypes.c_void_p),
    )


_library = load()
_half_linear = _library.function(
    "manylora_half_linear", ctypes.POINTER(HalfJob), ctypes.c_int, ctypes.c_int
)


@register("half_linear", "native")
def half_linear_native(
    x: torch.Tensor, tiles: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """See ``ops.half_linear``. Sums in float32, in an order that depends on nothing but the row.

    Tensors on another device are left to the reference.
    """
    if not (x.is_cpu and tiles.is_cpu and tiles.is_contiguous()):
        return reference.half_linear(x, tiles, out_features, bias)
    return _product(x, tiles, DTYPES.index(tiles.dtype), None, out_features, bias)


@register("int8_linear", "native")
def int8_linear_native(
    x: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """See ``ops.int8_linear``, and ``half_linear_native``."""
    if not (x.is_cpu and tiles.is_cpu and tiles.is_contiguous()):
        return int8_linear(x, tiles, scale, bias)
    return _product(x, tiles, INT8_KIND, scale.contiguous(), scale.shape[0], bias)


def _product(
    x: torch.Tensor,
    tiles: torch.Tensor,
    kind: int,
    scale: torch.Tensor | None,
    out_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    tokens, columns = x.shape
    rows = x if x.dtype is torch.float32 else x.to(torch.float32)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty((tokens, out_features), dtype=torch.float32)
    job = HalfJob(
        tiles.data_ptr(),
        rows.data_ptr(),
        None if shift is None else shift.data_ptr(),
        y.data_ptr(),
        kind,
        out_features,
        columns,
        tokens,
        rows.stride(0),
        None if scale is None else scale.data_ptr(),
    )
    if _half_linear(job, _library.isa_number, _library.threads):
        raise MemoryError("native half_linear: no memory for its scratch")
    return y if x.dtype is torch.float32 else y.to(x.dtype)
