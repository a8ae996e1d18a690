"""What all kernels' launches share: whose tensors are ours, and how products are computed."""

from __future__ import annotations

import torch
import triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = bool(triton.knobs.runtime.interpret)


def is_ours(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can compute with ``tensors``: on a GPU, of one dtype that they know."""
    first = tensors[0]
    if first.dtype not in DTYPES or any(tensor.dtype != first.dtype for tensor in tensors):
        return False
    return INTERPRETED or all(tensor.is_cuda for tensor in tensors)


def dots_in_float32(tensor: torch.Tensor) -> bool:
    """Whether operands of products must be widened: the interpreter multiplies bfloat16's bits."""
    return INTERPRETED and tensor.dtype is torch.bfloat16


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, copied if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def splits_of(columns: int, chunk: int, most: int) -> tuple[int, int]:
    """Return into how many parts a sum over ``columns`` is cut, and the length of one.

    Parts are whole chunks. It is a function of the weight's shape alone, never of the batch, or a
    token's sum would have another order in other company.
    """
    chunks = -(-columns // chunk)
    length = -(-chunks // max(1, most))
    return max(1, -(-chunks // length)), length * chunk
