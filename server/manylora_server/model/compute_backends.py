"""Which of the backends at hand computes each operation."""

from __future__ import annotations

import logging

import torch

from manylora_kernels import available_backends, gpu, native, operations, select_backend
from manylora_kernels.backends import REFERENCE
from manylora_server.core.config import CpuMath

logger = logging.getLogger(__name__)


def select_compiled_backends(device: torch.device, cpu_math: CpuMath = "float32") -> None:
    """Let the fastest backend that fits ``device`` and ``cpu_math`` compute each operation.

    bitsandbytes' operator is there once a 4-bit base is loaded, which imports the package.
    """
    wanted: list[str] = []
    if device.type == "cpu" and native.missing is None:
        wanted = [native.NATIVE_INT8] if cpu_math == "int8" else []
        wanted.append(native.NATIVE)
    elif device.type == "cuda":
        reason = gpu.load()
        if reason is None:
            wanted.append(gpu.TRITON)
        else:
            logger.warning("no Triton kernels, so everything is slower: %s", reason)
    wanted += ["bitsandbytes", REFERENCE]
    for operation in operations():
        available = available_backends(operation)
        select_backend(operation, next(name for name in wanted if name in available))
