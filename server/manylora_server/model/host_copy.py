"""An adapter as host memory keeps it: in the dtype of the device's pools, ready to be copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from manylora_store.compiler.canonical import CompiledAdapter, ModulePatch

# What float32 factors may be kept in, where nothing is lost.
NARROW_DTYPES = (torch.bfloat16, torch.float16)


def host_copy(compiled: CompiledAdapter, dtype: torch.dtype, *, pinned: bool) -> CompiledAdapter:
    """Return ``compiled`` with every tensor in ``dtype`` (page-locked if ``pinned``).

    The compiler's tensors are contiguous and in float32. For that dtype they stay as they are, but
    low-rank factors that 16 bits hold without loss are kept in 16 bits: a step of many adapters
    waits for their bytes. Raises ``OverflowError`` if a value is beyond the range of ``dtype``.
    """
    if dtype == torch.float32 and not pinned:
        patches = {name: _narrowed(patch) for name, patch in compiled.patches.items()}
        return replace(compiled, patches=patches)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        cast = tensor.to(dtype).contiguous()
        # The compiler has seen that all values are finite in float32.
        if dtype != torch.float32 and not bool(cast.isfinite().all()):
            raise OverflowError(f"the adapter holds values beyond the range of {dtype}")
        return cast.pin_memory() if pinned else cast

    def convert_patch(patch: ModulePatch) -> ModulePatch:
        factors = patch.low_rank
        return ModulePatch(
            low_rank=None
            if factors is None
            else replace(factors, a=convert(factors.a), b=convert(factors.b)),
            output_scale=None if patch.output_scale is None else convert(patch.output_scale),
            shift=None if patch.shift is None else convert(patch.shift),
            replacement=None
            if patch.replacement is None
            else {name: convert(tensor) for name, tensor in patch.replacement.items()},
        )

    patches = {name: convert_patch(patch) for name, patch in compiled.patches.items()}
    return replace(compiled, patches=patches)


def _narrowed(patch: ModulePatch) -> ModulePatch:
    factors = patch.low_rank
    if factors is None:
        return patch
    for dtype in NARROW_DTYPES:
        # Most that do not fit show it in their first row.
        if _fits(factors.a[:1], dtype) and _fits(factors.a, dtype) and _fits(factors.b, dtype):
            narrow = replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype))
            return replace(patch, low_rank=narrow)
    return patch


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).float(), tensor)


def adapter_bytes(compiled: CompiledAdapter) -> int:
    """Return the memory of all tensors of ``compiled``; a tensor in several places counts once."""
    unique = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for patch in compiled.patches.values()
        for tensor in _tensors(patch)
    }
    return sum(unique.values())


def _tensors(patch: ModulePatch) -> Iterator[torch.Tensor]:
    if patch.low_rank is not None:
        yield patch.low_rank.a
        yield patch.low_rank.b
    for tensor in (patch.output_scale, patch.shift):
        if tensor is not None:
            yield tensor
    if patch.replacement is not None:
        yield from patch.replacement.values()
