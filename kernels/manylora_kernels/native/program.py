"""Runs a recorded forward pass as one native call: see src/program.h for the structures."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum

from manylora_kernels.native.binding import load
from manylora_kernels.native.linear import NF4Matrix

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
        ("scalar", ctypes.c_float),
        ("weight", ctypes.POINTER(NF4Matrix)),
        ("bias", ctypes.c_void_p),
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


class Hook(ctypes.Structure):
    """What the adapters do to one module in a step."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("lora", ctypes.c_int64),
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
        step.isa = _library.isa_number
        step.threads = _library.threads
        if _run(self._handle, step, first, last):
            raise MemoryError("native program: no memory for its scratch")
