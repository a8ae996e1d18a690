"""The Triton backend: every operation on a CUDA device, or in Triton's interpreter on a CPU.

Nothing is imported or registered before ``load`` is called, so a server on a CPU never pays for
Triton. What is no tensor of the backend's (see ``launch.is_ours``) is computed by the reference.
"""

from __future__ import annotations

import importlib.util

TRITON = "triton"
OPERATIONS = ("lora_delta_", "nf4_linear", "paged_attention", "scale_shift_", "store_kv_")
# Triton has no matrix instructions for older ones: what it makes for 7.5 spills thousands of bytes.
MIN_CAPABILITY = (8, 0)


def missing() -> str | None:
    """Return why the backend cannot be had here, ``None`` where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import torch
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, capability))
        return f"the device has compute capability {found}; {needed} is needed"
    return None


def load() -> str | None:
    """Register the backend ``triton`` for all ``OPERATIONS``; return why not where it cannot be."""
    reason = missing()
    if reason is None:
        from manylora_kernels.gpu import kv, linear, lora, paged, scale  # noqa: F401 - register
    return reason
