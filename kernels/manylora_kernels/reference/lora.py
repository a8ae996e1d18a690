"""Segmented low-rank products and per-token affine maps in plain PyTorch."""

from __future__ import annotations

import torch

from manylora_kernels.backends import REFERENCE, register


@register("lora_delta_", REFERENCE)
def lora_delta_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor | None,
    first_row: int,
    spans: list[int],
) -> None:
    """See ``ops.lora_delta_``. With ``gate``, two products for the whole batch."""
    if gate is not None:
        rows = slice(first_row, first_row + gate.shape[1])
        projected = x @ a[rows].t()
        projected.mul_(gate)
        # A product with 0 would keep another adapter's NaN or infinity.
        projected.masked_fill_(gate == 0, 0.0)
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            y[start:end].addmm_(projected[start:end], b[rows])
        return
    for (start, end, row_start, row_end), weight in zip(
        segments.tolist(), weights.tolist(), strict=True
    ):
        projected = x[start:end] @ a[row_start:row_end].t()
        y[start:end].addmm_(projected, b[row_start:row_end], alpha=weight)


@register("scale_shift_", REFERENCE)
def scale_shift_(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, segments: torch.Tensor
) -> None:
    """See ``ops.scale_shift_``."""
    for start, end, row in segments.tolist():
        torch.addcmul(shift[row], y[start:end], scale[row], out=y[start:end])
