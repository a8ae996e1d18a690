"""``lora_delta_`` by the native library."""

from __future__ import annotations

import ctypes

import torch

from manylora_kernels.backends import register
from manylora_kernels.native.binding import load
from manylora_kernels.reference.lora import lora_delta_ as lora_delta_reference

_library = load()
_lora_delta = _library.function(
    "manylora_lora_delta",
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_int,
)
# As FactorType of src/lora.h.
FACTOR_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@register("lora_delta_", "native")
def lora_delta_native(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor | None,
    valid: torch.Tensor | None,
    rows: torch.Tensor | None,
    scales: torch.Tensor | None,
    step: int,
) -> None:
    """See ``ops.lora_delta_``. The order of a token's sums depends on nothing but its own segment.

    Computes float32 on the CPU, with contiguous factors of 32 or 16 bits; the reference computes
    all else.
    """
    takes = (
        y.dtype is x.dtype is torch.float32
        and a.dtype is b.dtype
        and a.dtype in FACTOR_TYPES
        and all(tensor.is_cpu for tensor in (y, x, a, b))
        and a.is_contiguous()
        and b.is_contiguous()
        and (y.stride(1) == 1 or y.shape[1] == 1)
        and (x.stride(1) == 1 or x.shape[1] == 1)
    )
    if not takes:
        lora_delta_reference(y, x, a, b, segments, weights, tokens, valid, rows, scales, step)
        return
    status = _lora_delta(
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        a.data_ptr(),
        b.data_ptr(),
        FACTOR_TYPES.index(a.dtype),
        x.shape[1],
        y.shape[1],
        segments.data_ptr(),
        weights.data_ptr(),
        segments.shape[0],
        _library.isa_number,
        _library.threads,
    )
    if status:
        raise MemoryError("native lora_delta_: no memory for its scratch")
