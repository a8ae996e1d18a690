"""Training for 4 bits: weights that are dense on one step and rounded to NF4 on the next.

The demo is served from NF4 weights, and a model of a million parameters notices the rounding. So
half of the training steps see the weights as the server will hold them.
"""

from __future__ import annotations

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.nn.utils import parametrize

BLOCK = 64


def nf4_rounded(weight: Tensor) -> Tensor:
    """`weight` after a round trip through NF4 with double quantization."""
    packed, state = functional.quantize_4bit(
        weight.detach(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded.to(weight.dtype)


class StraightThroughNF4(nn.Module):
    """A parametrization: rounded going forward while `enabled`, the identity going backward."""

    def __init__(self) -> None:
        """Start switched off."""
        super().__init__()
        self.enabled = False

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses on this step."""
        if not self.enabled:
            return weight
        return weight + (nf4_rounded(weight) - weight).detach()


def add_rounding(layers: nn.Module) -> list[StraightThroughNF4]:
    """Put a switchable rounding on every linear layer below `layers`."""
    roundings = []
    for module in list(layers.modules()):
        if isinstance(module, nn.Linear):
            rounding = StraightThroughNF4()
            parametrize.register_parametrization(module, "weight", rounding)
            roundings.append(rounding)
    return roundings


def remove_rounding(layers: nn.Module) -> None:
    """Take the roundings away again and leave the dense weights."""
    for module in list(layers.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


class FrozenWeights:
    """Both forms of a frozen model's linear weights, to switch between without arithmetic."""

    def __init__(self, layers: nn.Module) -> None:
        """Round every linear layer below `layers` once."""
        self._parameters = [m.weight for m in layers.modules() if isinstance(m, nn.Linear)]
        self._dense = [parameter.data for parameter in self._parameters]
        self._rounded = [nf4_rounded(weight) for weight in self._dense]

    @torch.no_grad()
    def use(self, rounded: bool) -> None:
        """Point every layer at its rounded or its dense weight."""
        chosen = self._rounded if rounded else self._dense
        for parameter, weight in zip(self._parameters, chosen, strict=True):
            parameter.data = weight
