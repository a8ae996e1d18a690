"""What an adapter makes of a module's weight, exactly, by ranges of rows.

The equations of ``manylora_store.compiler.canonical`` with ``x`` taken out. For a linear module::

    W' = diag(g) (W + scaling * B A),    b' = g * b + shift

and for an embedding, row by row, ``W'[t] = g * (e W[t] + scaling * A[:, t] B) + shift``, where
``e`` is the module's own multiplier, which a twin's plain embedding no longer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_kernels import half, nf4_pieces
from manylora_server.model.half_linear import HalfModule
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear
from manylora_store.compiler.canonical import (
    BaseLayout,
    CompiledAdapter,
    ModulePatch,
    ModuleSpec,
)
from manylora_store.errors import AdapterUnsupportedError

# What the equations above are made of. An adapter that says more cannot be folded by them.
_PATCH = {"low_rank", "output_scale", "shift", "replacement"}
_ADAPTER = {"record", "patches"}
_KINDS = {"linear", "embedding", "norm"}


def check_mergeable(adapter: CompiledAdapter, layout: BaseLayout) -> None:
    """Raise ``AdapterUnsupportedError``, naming the part, if ``adapter`` is more than weights."""
    extra = _more_than(adapter, _ADAPTER)
    if extra is not None:
        raise AdapterUnsupportedError(
            f"merge: the adapter's {extra} cannot be folded into the base's weights"
        )
    for name, patch in adapter.patches.items():
        kind = layout.modules[name].kind
        if kind not in _KINDS:
            raise AdapterUnsupportedError(
                f"merge: module {name!r} is neither a linear, an embedding nor a norm module"
            )
        extra = _more_than(patch, _PATCH)
        if extra is not None:
            raise AdapterUnsupportedError(
                f"merge: {extra} of module {name!r} cannot be folded into its weight"
            )


def _more_than(given: Any, known: set[str]) -> str | None:
    for part in fields(given):
        value = getattr(given, part.name)
        empty = value is None or (isinstance(value, Mapping | tuple | list) and not value)
        if part.name not in known and not empty:
            return part.name.replace("_", " ")
    return None


class ExactModule:
    """A linear or embedding module with ``patch`` folded in; ``base`` is what is served."""

    def __init__(
        self, base: nn.Module, spec: ModuleSpec, patch: ModulePatch, device: torch.device
    ) -> None:
        assert spec.kind in {"linear", "embedding"}
        self.base = base
        self.spec = spec
        # oneDNN's layout gives up its rows only together.
        self._unpacked = base.dense_weight() if isinstance(base, PackedLinear) else None
        self.rows, self.columns = spec.shape
        self._device = device
        self._is_embedding = spec.kind == "embedding"
        self._a = self._b = self._scale = self._shift = None
        factors = patch.low_rank
        if factors is not None:
            self._a, self._b = self._here(factors.a), self._here(factors.b)
            self._scaling = factors.scaling
        if patch.output_scale is not None:
            self._scale = self._here(patch.output_scale)
        if patch.shift is not None:
            self._shift = self._here(patch.shift)
        self._replacement = patch.replacement or {}

    def base_rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the base's rows in float32, an embedding's with its multiplier."""
        unpacked = self._unpacked
        rows = weight_rows(self.base, start, stop) if unpacked is None else unpacked[start:stop]
        return rows * self.spec.output_multiplier if self._is_embedding else rows

    def merged_rows(self, start: int, stop: int, base: torch.Tensor) -> torch.Tensor:
        """Return ``W'[start:stop]`` in float32; ``base`` is what ``base_rows`` returned."""
        rows = base
        replaced = self._replacement.get("weight")
        if replaced is not None:
            whole = replaced.t() if self.spec.transposed else replaced
            rows = self._here(whole[start:stop]) * self.spec.output_multiplier
        if self._a is not None and self._b is not None:
            if self._is_embedding:
                delta = self._a[:, start:stop].t() @ self._b
            else:
                delta = self._b[:, start:stop].t() @ self._a
            rows = rows + self._scaling * delta
        if self._is_embedding:
            rows = rows if self._scale is None else rows * self._scale
            return rows if self._shift is None else rows + self._shift
        return rows if self._scale is None else rows * self._scale[start:stop, None]

    def bias(self) -> torch.Tensor | None:
        """Return a linear module's ``b'`` in float32, ``None`` where there is none."""
        bias = self._replacement.get("bias")
        if bias is None:
            bias = getattr(self.base, "bias", None)
        result = None if bias is None else self._here(bias.detach())
        if result is not None and self._scale is not None:
            result = result * self._scale
        if self._shift is None:
            return result
        return self._shift if result is None else result + self._shift

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, torch.float32)


def weight_rows(module: nn.Module, start: int, stop: int) -> torch.Tensor:
    """Return rows ``[start, stop)`` of ``W [out, in]``, or of an embedding's, in float32.

    ``start`` is a multiple of 16.
    """
    if isinstance(module, NF4Linear):
        return nf4_pieces.read_rows(module.weight_nf4, start, stop)
    if isinstance(module, HalfModule):
        return half.read_rows(module.weight_half, start, stop)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    plain = weight.detach().t() if isinstance(module, Conv1D) else weight.detach()
    return plain[start:stop].float()
