"""Finds the shared library, checks that it fits, and hands it torch's own thread team.

The library is an ordinary one with a C interface: it needs neither Python's nor torch's headers,
so one build serves every version of both. ``docs/decisions/0009`` explains the threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

# As in src/runtime.cpp.
INTERFACE = 7
ISAS = ("portable", "avx2", "avx512")
ISA_VARIABLE = "MANYLORA_NATIVE_ISA"
LIBRARY_VARIABLE = "MANYLORA_NATIVE_LIBRARY"
_BUILD_HINT = "run `make native`, which needs a C++17 compiler"


class LibraryMissingError(Exception):
    """The native library cannot be used here; the message says why and what would help."""


class NativeLibrary:
    """The loaded library, and the instruction set that its calls use."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            interface = self._library.manylora_interface()
        except (OSError, AttributeError) as error:
            raise LibraryMissingError(
                f"{path} cannot be loaded ({error}); {_BUILD_HINT}"
            ) from error
        if interface != INTERFACE:
            raise LibraryMissingError(
                f"{path} was built from other sources (interface {interface}, not {INTERFACE}); "
                f"{_BUILD_HINT}"
            )
        self.path = path
        self.isas = tuple(
            name for number, name in enumerate(ISAS) if self._library.manylora_supports(number)
        )
        self.has_threads = self._share_threads()
        self.select_isa(os.environ.get(ISA_VARIABLE) or self.isas[-1])

    def select_isa(self, name: str) -> None:
        """Let calls use instruction set ``name`` from now on."""
        if name not in self.isas:
            raise ValueError(
                f"{ISA_VARIABLE} is {name!r}; this machine runs {', '.join(self.isas)}"
            )
        self.isa = name
        self._isa_number = ISAS.index(name)

    def fill_scratch(self, value: float | None) -> None:
        """Let scratch memory hold ``value`` before it is written to; ``None``: whatever it does."""
        self._library.manylora_fill_scratch(
            int(value is not None), ctypes.c_float(0.0 if value is None else value)
        )

    @property
    def isa_number(self) -> int:
        """The selected instruction set as the library numbers it."""
        return self._isa_number

    @property
    def threads(self) -> int:
        """How many threads a call may use: torch's own number, 1 where they cannot be shared."""
        return torch.get_num_threads() if self.has_threads else 1

    def function(
        self, name: str, *argument_types: Any, returns: Any = ctypes.c_int
    ) -> Callable[..., Any]:
        """Return the library's function ``name``; most return a status, of which 0 is done."""
        found = getattr(self._library, name)
        found.argtypes = argument_types
        found.restype = returns
        return cast("Callable[..., Any]", found)

    def _share_threads(self) -> bool:
        """Give the library the OpenMP entry point that torch itself calls.

        Where torch was built with another runtime than GNU's there may be none: then one thread.
        """
        library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        try:
            entry = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            return False
        address = ctypes.cast(entry, ctypes.c_void_p)
        self._library.manylora_use_gomp_parallel(address)
        return True


@functools.cache
def load() -> NativeLibrary:
    """Return the library; ``LibraryMissingError`` where it is not built or does not fit."""
    named = os.environ.get(LIBRARY_VARIABLE)
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        raise LibraryMissingError(f"they are not built here; {_BUILD_HINT}")
    return NativeLibrary(found[0])
