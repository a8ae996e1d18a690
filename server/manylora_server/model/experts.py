"""Mixture-of-experts layers whose expert matrices are held in 4 bits.

transformers keeps all experts of a layer in two 3-d parameters, which bitsandbytes' module
replacement does not see: without this, a 4-bit Mixtral would keep 96 % of its weights dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from manylora_kernels import NF4Weight, nf4_linear
from manylora_server.model.nf4_linear import from_quant_state

logger = logging.getLogger(__name__)


class NF4Experts(nn.Module):
    """``y[t] = sum over the token's experts e of w_e * down_e(act(gate_e x) * up_e x)``.

    Takes the place of a layer's experts module. ``gate_up[e]`` is ``[2 * intermediate, hidden]``
    and ``down[e]`` ``[hidden, intermediate]``, each packed on its own.
    """

    def __init__(
        self,
        gate_up: list[NF4Weight],
        down: list[NF4Weight],
        apply_gate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self._apply_gate = apply_gate

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return ``[T, hidden]`` for ``hidden_states [T, hidden]`` and the router's ``[T, k]``."""
        result = torch.zeros_like(hidden_states)
        tokens = top_k_index.shape[0]
        choices = top_k_index.reshape(-1)
        order = torch.argsort(choices, stable=True)
        counts = torch.bincount(choices, minlength=len(self.down)).tolist()
        row_of = torch.div(order, top_k_index.shape[1], rounding_mode="floor")
        weights = top_k_weights.reshape(-1)[order]
        start = 0
        for expert, count in enumerate(counts[: len(self.down)]):
            if count:
                rows = row_of[start : start + count]
                hidden = self._apply_gate(nf4_linear(hidden_states[rows], self.gate_up[expert]))
                out = nf4_linear(hidden, self.down[expert])
                out = out * weights[start : start + count, None]
                result.index_add_(0, rows, out.to(result.dtype))
            start += count
        assert result.shape[0] == tokens
        return result


def quantize_experts(model: nn.Module) -> int:
    """Replace every experts module of the usual form by one in NF4; return how many.

    The usual form is concatenated ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]`` without
    biases. Others stay dense, and a warning says so.
    """
    import bitsandbytes.functional as bnb_functional

    def pack(matrices: torch.Tensor) -> list[NF4Weight]:
        packed = []
        for matrix in matrices:
            data, state = bnb_functional.quantize_4bit(
                matrix.contiguous(), quant_type="nf4", compress_statistics=True
            )
            packed.append(from_quant_state(data, state, (matrix.shape[0], matrix.shape[1])))
        return packed

    replaced = 0
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if not any(parameter.dim() == 3 for parameter in parameters.values()):
            continue
        usual = (
            set(parameters) == {"gate_up_proj", "down_proj"}
            and getattr(module, "is_concatenated", False)
            and not getattr(module, "is_transposed", True)
            and not getattr(module, "has_post_expert_norm", False)
        )
        if not usual:
            logger.warning("module %s: its expert weights stay dense (form not known)", name)
            continue
        experts = NF4Experts(
            pack(parameters["gate_up_proj"].detach()),
            pack(parameters["down_proj"].detach()),
            module._apply_gate,
        )
        # The gate's bound method keeps the module; its dense weights must not stay with it.
        del module.gate_up_proj, module.down_proj
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)
        replaced += 1
    return replaced
