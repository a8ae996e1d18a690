"""Runs a recorded forward pass as one native call: see src/program.h for the structures."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum

from manylora_kernels.backends import selected_backend
from manylora_kernels.native.binding import load
from manylora_kernels.native.int8 import uses_amx
from manylora_kernels.native.lora import FACTOR_TYPES

MAX_DIMS = 5

_library = load()


class Place(IntEnum):
    """Where an operand lies."""

    NOWHERE = 0
    SLOT = 1
    ADDRESS = 2
    SCALAR = 3


class Code(IntEnum):
    """What an instruction does."""

    UNARY = 0
    BINARY = 1
    MEAN = 2
    NF4_LINEAR = 3
    LORA = 4
    RESCALE = 5
    FOREIGN = 6
    HALF_LINEAR = 7
    ATTENTION = 8


class Unary(IntEnum):
    """Functions of one element."""

    COPY = 0
    NEGATE = 1
    SQUARE = 2
    INVERSE_ROOT = 3
    SIGMOID = 4
    SILU = 5
    TANH = 6
    GELU_TANH = 7
    RELU = 8
    EXPONENTIAL = 9


class Binary(IntEnum):
    """Functions of two elements."""

    ADD = 0
    SUBTRACT = 1
    MULTIPLY = 2
    DIVIDE = 3


class AffineInt(ctypes.Structure):
    """``constant + per_token * tokens + per_output * outputs``."""

    _fields_ = (
        ("constant", ctypes.c_int64),
        ("per_token", ctypes.c_int64),
        ("per_output", ctypes.c_int64),
    )


class Operand(ctypes.Structure):
    """A float32 array."""

    _fields_ = (
        ("place", ctypes.c_int64),
        ("base", ctypes.c_int64),
        ("offset", AffineInt),
        ("stride", AffineInt * MAX_DIMS),
    )


class Instruction(ctypes.Structure):
    """One kernel call."""

    _fields_ = (
        ("code", ctypes.c_int64),
        ("function", ctypes.c_int64),
        ("hook", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("size", AffineInt * MAX_DIMS),
        ("out", Operand),
        ("a", Operand),
        ("b", Operand),
        ("c", Operand),
        ("scalar", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class HalfMatrix(ctypes.Structure):
    """A ``HalfWeight``, or an ``Int8Weight`` with its ``scale``."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
    )


class AttentionLayer(ctypes.Structure):
    """What one layer's attention always is."""

    _fields_ = (
        ("layer", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class LayerCache(ctypes.Structure):
    """One layer's paged keys and values."""

    _fields_ = (("k", ctypes.c_void_p), ("v", ctypes.c_void_p))


class Pages(ctypes.Structure):
    """A step's paged cache, as ``ops.paged_attention`` describes it."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("block_tokens", ctypes.c_int64),
    )


class LoraRuns(ctypes.Structure):
    """A ``RankSegments``' tensors."""

    _fields_ = (
        ("runs", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class RescaleRuns(ctypes.Structure):
    """The runs of ``ops.scale_shift_``."""

    _fields_ = (("runs", ctypes.c_void_p), ("count", ctypes.c_int64))


class HookPool(ctypes.Structure):
    """Rank rows of one type of factors."""

    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("runs", ctypes.c_int64))


class Hook(ctypes.Structure):
    """What the adapters do to one module in a step; pools in the order of ``FACTOR_TYPES``."""

    _fields_ = (
        ("pools", HookPool * len(FACTOR_TYPES)),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("rescale", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """One step's sizes and addresses."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("hooks", ctypes.c_void_p),
        ("lora", ctypes.c_void_p),
        ("rescale", ctypes.c_void_p),
        ("pages", Pages),
        ("math", ctypes.c_int64),
        ("isa", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


_new = _library.function(
    "manylora_program_new", ctypes.c_void_p, ctypes.c_int64, returns=ctypes.c_void_p
)
_free = _library.function("manylora_program_free", ctypes.c_void_p, returns=None)
_run = _library.function(
    "manylora_program_run",
    ctypes.c_void_p,
    ctypes.POINTER(Step),
    ctypes.c_int64,
    ctypes.c_int64,
)


class NativeProgram:
    """A list of instructions that the library keeps. What they point to, the caller keeps."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        array = (Instruction * len(instructions))(*instructions)
        self._handle = _new(array, len(instructions))
        if not self._handle:
            raise MemoryError("no memory for a native program")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _free(self._handle)

    def run(self, step: Step, first: int, last: int) -> None:
        """Execute instructions ``[first, last)`` with ``step``'s sizes and addresses."""
        eight_bits = selected_backend("nf4_linear") == "native-int8"
        step.math = 1 + uses_amx() if eight_bits else 0
        step.isa = _library.isa_number
        step.threads = _library.threads
        if _run(self._handle, step, first, last):
            raise MemoryError("native program: no memory for scratch, or a page beyond the cache")
