"""A linear layer whose weight stays packed in 4 bits, and how to make one of bitsandbytes'."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from manylora_kernels import NF4Weight, nf4_linear, prepare_nf4
from manylora_server.core.errors import StartupError


class NF4Linear(nn.Module):
    """``y = W x + bias`` with ``W [out, in]`` in 4 bits. The packed bytes are never written to."""

    bias: torch.Tensor | None

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight_nf4 = weight
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The packed bytes; only their device is meaningful to callers in transformers."""
        return self.weight_nf4.packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        out_features, in_features = self.weight_nf4.shape
        y = nf4_linear(x.reshape(-1, in_features), self.weight_nf4, self.bias)
        return y.view(*x.shape[:-1], out_features)


def from_quant_state(packed: torch.Tensor, state: Any, shape: tuple[int, int]) -> NF4Weight:
    """Return bitsandbytes' packed tensor and ``QuantState`` as an ``NF4Weight``.

    In the layout of the selected backend, which may be a copy: the given one is to be dropped then.
    """
    nested = state.state2 if state.nested else None
    weight = NF4Weight(
        packed=packed.detach(),
        code=state.code,
        absmax=state.absmax,
        shape=shape,
        block_size=int(state.blocksize),
        quant_type=state.quant_type,
        absmax_code=None if nested is None else nested.code,
        absmax_scale=None if nested is None else nested.absmax,
        absmax_offset=0.0 if nested is None else float(state.offset),
        absmax_block_size=256 if nested is None else int(nested.blocksize),
    )
    return prepare_nf4(weight)


def replace_4bit_linears(model: nn.Module, compute_dtype: torch.dtype) -> int:
    """Put an ``NF4Linear`` over the same bytes in place of each ``bitsandbytes.nn.Linear4bit``.

    Returns how many were replaced. ``StartupError`` for a layer of another bitsandbytes kind:
    LLM.int8 chooses its outlier columns over all rows of a batch, so one request's output would
    depend on who else is in it.
    """
    import bitsandbytes as bnb

    replaced = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear8bitLt):
            raise StartupError(
                f"module {name} is quantized by LLM.int8, whose outlier columns depend on the "
                "whole batch. Use a checkpoint quantized to 4 bits, or the dense one."
            )
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        state = module.weight.quant_state
        if state is None or getattr(state, "packing_format_for_cpu", False):
            raise StartupError(f"module {name} has no 4-bit weight in the portable layout.")
        weight = from_quant_state(
            module.weight.data, state, (module.out_features, module.in_features)
        )
        bias = None if module.bias is None else module.bias.detach().to(compute_dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(weight, bias))
        replaced += 1
    return replaced
