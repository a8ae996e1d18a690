"""Running native kernels under test: a chosen instruction set, memory poisoned with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from manylora_kernels import available_backends, native, operations, select_backend
from manylora_kernels.backends import REFERENCE

NAN = float("nan")


@contextmanager
def native_kernels(isa: str) -> Iterator[None]:
    """Compute every operation natively with ``isa``; what is uninitialized is NaN meanwhile."""
    library = native.library
    before = library.isa
    chosen = [name for name in operations() if native.NATIVE in available_backends(name)]
    try:
        for operation in chosen:
            select_backend(operation, native.NATIVE)
        library.select_isa(isa)
        library.fill_scratch(NAN)
        torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialized
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        library.fill_scratch(None)
        library.select_isa(before)
        for operation in chosen:
            select_backend(operation, REFERENCE)


def surrounded(values: torch.Tensor) -> torch.Tensor:
    """Return a view with the same values and NaN on all sides of it."""
    whole = torch.full((values.numel() + 128,), NAN, dtype=values.dtype)
    view = whole[64:-64].view(values.shape)
    view.copy_(values)
    return view


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal float32 values surrounded by NaN."""
    return surrounded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
