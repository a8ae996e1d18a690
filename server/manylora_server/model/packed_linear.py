"""Dense linear layers on a CPU, with the weight kept in 16 bits or in oneDNN's own blocked layout.

torch's ``F.linear`` hands a plain row-major weight to the BLAS, which packs it anew at every call;
for the few rows of a decode step that costs as much as the product. Packed once, the same float32
product took 0.4 to 0.9 of the time at 4 to 64 rows (docs/performance.md). A weight that 16 bits
hold without loss goes to ``HalfLinear`` instead, whose product is faster still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_kernels import packed_linear
from manylora_server.model.half_linear import HalfEmbedding, HalfLinear, halved


class PackedLinear(nn.Module):
    """``y = W x + bias`` with ``W [out, in]`` packed; values and float32 sums as ``F.linear``'s.

    The plain weight is not kept: ``dense_weight`` unpacks it, bit for bit.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The packed weight; only its dtype and device mean anything to callers in transformers."""
        packed: torch.Tensor = self._packed
        return packed

    def dense_weight(self) -> torch.Tensor:
        """Return ``W [out, in]``."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        rows = x.reshape(-1, self.in_features)
        y = packed_linear(rows, self._packed, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch can pack weights of ``dtype`` on ``device``."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """How many layers were replaced by each kind."""

    half: int
    full: int


def pack_linears(model: Any, *, copy_tied_head: bool) -> Packed:
    """Replace the dense linear modules of ``model``, whose weights are float32, in place.

    By a ``HalfLinear`` where nothing is lost, else by a ``PackedLinear``; the plain weights go.
    Embeddings that are tied to a half head share its weight. Where they are of a class of their
    own, or the head is not half, a head needs a copy: made if it is a half one or
    ``copy_tied_head``.
    """
    embedding = model.get_input_embeddings()
    embeddings = embedding.weight
    half = full = 0
    for module in list(model.modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        plain = module.weight.t() if isinstance(module, Conv1D) else module.weight
        weight = plain.detach().contiguous()
        bias = None if module.bias is None else module.bias.detach()
        replacement: HalfLinear | PackedLinear | None = halved(weight, bias)
        if isinstance(replacement, HalfLinear):
            half += 1
            if module.weight is embeddings and type(embedding) is nn.Embedding:
                _put(model, embedding, HalfEmbedding(replacement.weight_half))
        elif module.weight is embeddings and not copy_tied_head:
            continue
        else:
            replacement = PackedLinear(weight, bias)
            full += 1
        _put(model, module, replacement)
    return Packed(half, full)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is in ``model``."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
