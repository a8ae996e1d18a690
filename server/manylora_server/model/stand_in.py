"""Layers of transformers' own classes over a weight that stays packed where it is.

PEFT picks its adapter layer by the class of the base's layer (``nn.Linear`` and so on) and looks
at its ``weight`` for shape, dtype and device. A stand-in is of that class and has such a weight,
but computes with the packed layer it was made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_server.model.half_linear import HalfEmbedding, HalfLinear, HalfModule
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear

PackedLayer = NF4Linear | PackedLinear | HalfLinear | HalfEmbedding


class StandIn(nn.Module):
    """Computes what ``layer`` does, with its packed ``W`` and a bias of its own.

    ``layer`` must belong to the stand-in alone: its bias becomes the stand-in's, which may be
    written to. Until ``shows_values`` is set, ``weight`` is a tensor without storage that has only
    the shape, dtype and device of ``W``; then it is ``W``, unpacked at every access and not kept.
    A deep copy is an ordinary layer with a dense weight.
    """

    _layer: PackedLayer
    _shape: tuple[int, int]
    _dtype: torch.dtype

    def _stand_for(self, layer: PackedLayer, dtype: torch.dtype) -> None:
        # Not as a submodule: PEFT matches names of submodules.
        object.__setattr__(self, "_layer", layer)
        self.shows_values = False
        self._dtype = dtype
        bias = None
        if layer.bias is not None:
            bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
            layer._buffers["bias"] = bias
        self.register_parameter("bias", bias)
        self._shape = _shape(layer)

    @property
    def weight(self) -> torch.Tensor:
        """``W`` as the class stores it: ``[out, in]``, ``[in, out]`` for ``Conv1D``."""
        if self.shows_values:
            weight = self._dense()
        else:
            blank = torch.zeros((), dtype=self._dtype, device=self._layer.weight.device)
            weight = blank.expand(self._shape)
        return weight.t() if isinstance(self, Conv1D) else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the packed layer does."""
        y: torch.Tensor = self._layer(x)
        return y

    def shares_weight(self, other: StandIn) -> bool:
        """Whether both stand for one weight, as tied embeddings and heads do."""
        mine, theirs = self._layer, other._layer
        return (
            isinstance(mine, HalfModule)
            and isinstance(theirs, HalfModule)
            and mine.weight_half is theirs.weight_half
        )

    def _dense(self) -> torch.Tensor:
        if isinstance(self._layer, NF4Linear):
            return self._layer.weight_nf4.dequantize(self._dtype)
        return self._layer.dense_weight()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        out_features, in_features = self._shape
        weight, bias = self._dense(), self._parameters["bias"]
        ordinary: nn.Module
        with torch.device("meta"):
            if isinstance(self, Conv1D):
                ordinary = Conv1D(out_features, in_features)
                weight = weight.t().contiguous()
            elif isinstance(self, nn.Embedding):
                ordinary = nn.Embedding(out_features, in_features)
            else:
                ordinary = nn.Linear(in_features, out_features, bias=bias is not None)
        ordinary.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            ordinary.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return ordinary.train(self.training)


class LinearStandIn(StandIn, nn.Linear):  # type: ignore[override]  # its weight is computed
    """A stand-in that PEFT takes for an ``nn.Linear``."""

    def __init__(self, layer: PackedLayer, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._stand_for(layer, dtype)
        self.out_features, self.in_features = self._shape


class Conv1DStandIn(StandIn, Conv1D):  # type: ignore[misc]  # transformers is untyped
    """A stand-in that PEFT takes for transformers' ``Conv1D``."""

    def __init__(self, layer: PackedLayer, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._stand_for(layer, dtype)
        self.nf, self.nx = self._shape


class EmbeddingStandIn(StandIn, nn.Embedding):  # type: ignore[override]  # its weight is computed
    """A stand-in that PEFT takes for an ``nn.Embedding``."""

    def __init__(self, layer: PackedLayer, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._stand_for(layer, dtype)
        self.num_embeddings, self.embedding_dim = self._shape
        self.padding_idx = self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = self.sparse = False


def _shape(layer: PackedLayer) -> tuple[int, int]:
    if isinstance(layer, NF4Linear):
        return layer.weight_nf4.shape
    if isinstance(layer, HalfEmbedding):
        return layer.weight_half.shape
    return (layer.out_features, layer.in_features)
