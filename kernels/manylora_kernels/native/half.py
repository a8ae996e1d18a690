"""``half_linear`` by the native library."""

from __future__ import annotations

import ctypes

import torch

from manylora_kernels.backends import register
from manylora_kernels.half import DTYPES
from manylora_kernels.native.binding import load
from manylora_kernels.reference import half as reference


class HalfJob(ctypes.Structure):
    """``HalfJob`` of src/half.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tiles", "x", "bias", "y")),
        *(
            (name, ctypes.c_int64)
            for name in ("kind", "out_features", "in_features", "tokens", "x_stride")
        ),
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
        DTYPES.index(tiles.dtype),
        out_features,
        columns,
        tokens,
        rows.stride(0),
    )
    if _half_linear(job, _library.isa_number, _library.threads):
        raise MemoryError("native half_linear: no memory for its scratch")
    return y if x.dtype is torch.float32 else y.to(x.dtype)
