"""Gives memory that adapters left back to the operating system."""

from __future__ import annotations

import ctypes
import sys


def give_memory_back() -> None:
    """Ask the C library to return freed memory now; where it is not glibc, nothing is needed.

    glibc keeps freed blocks up to a size that grows with use (at most 32 MiB), which is where most
    of an adapter's tensors are: without this, an unloaded adapter's memory stays with the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
