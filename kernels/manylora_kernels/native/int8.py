"""``nf4_linear`` by the native library with activations in eight bits."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from manylora_kernels.backends import register
from manylora_kernels.native.binding import load
from manylora_kernels.native.linear import NF4Matrix, product

_library = load()
_nf4_linear_int8 = _library.function(
    "manylora_nf4_linear_int8",
    ctypes.POINTER(NF4Matrix),
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
)
_ask_for_amx = _library.function("manylora_amx")
_amx_allowed = True


@functools.cache
def amx_available() -> bool:
    """Whether the processor has AMX and the system lets this process use it; asks for that."""
    return bool(_ask_for_amx())


def allow_amx(allowed: bool) -> None:
    """Let calls use AMX where it is available, which they do at first, or not. Same results."""
    global _amx_allowed
    _amx_allowed = allowed


def uses_amx() -> bool:
    """Whether calls of many tokens use AMX now."""
    return _amx_allowed and _library.isa == "avx512" and amx_available()


@register("nf4_linear", "native-int8")
def nf4_linear_native_int8(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    form: Sequence[int],
    absmax_offset: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See ``reference.int8`` for the equation: the same bits, with every instruction set.

    What ``native`` cannot take is computed as there, in float.
    """
    return product(_call, x, weight, form, absmax_offset, bias)


def _call(matrix: NF4Matrix, x: int, tokens: int, bias: int | None, y: int) -> int:
    isa, threads = _library.isa_number, _library.threads
    return int(_nf4_linear_int8(matrix, x, tokens, bias, y, isa, uses_amx(), threads))
