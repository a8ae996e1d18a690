"""The compiled CPU backend: C++ called through ctypes, where the package's build found a compiler.

Importing this module registers the backends ``native`` and ``native-int8`` if the library is there
and fits.
"""

from __future__ import annotations

import logging

from manylora_kernels.native.binding import LibraryMissingError, load

logger = logging.getLogger(__name__)

NATIVE = "native"
NATIVE_INT8 = "native-int8"
# Why the backend is not there; None where it is.
missing: str | None = None

try:
    library = load()
except LibraryMissingError as error:
    missing = str(error)
    logger.debug("no native kernels: %s", missing)
else:
    import manylora_kernels.native.attention
    import manylora_kernels.native.half
    import manylora_kernels.native.int8
    import manylora_kernels.native.linear
    import manylora_kernels.native.lora  # noqa: F401 - all register
