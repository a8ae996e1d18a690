"""The Triton backend under test: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from manylora_kernels import gpu, select_backend, selected_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

_reason = gpu.load()
requires_triton = pytest.mark.skipif(_reason is not None, reason=f"no Triton kernels: {_reason}")


@pytest.fixture
def triton_selected() -> Iterator[None]:
    """Let Triton compute every operation."""
    before = {operation: selected_backend(operation) for operation in gpu.OPERATIONS}
    for operation in before:
        select_backend(operation, gpu.TRITON)
    yield
    for operation, backend in before.items():
        select_backend(operation, backend)


def signed(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values of both signs, none of them near zero, the same on every device."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.1 * noise.sign()).to(DEVICE, dtype)


def assert_within(
    got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, roundings: float
) -> None:
    """Each element within so many roundings of its dtype of ``size``, what was summed for it."""
    error = (got.double() - expected.double()).abs()
    limit = roundings * torch.finfo(got.dtype).eps * size.double() + 1e-30
    worst = float((error / limit).max()) if error.numel() else 0.0
    assert not got.isnan().any()
    assert worst <= 1, f"{worst * roundings:.2f} roundings, allowed: {roundings}"
