"""How a twin keeps a weight: what takes its rows, rounds them, and becomes a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from manylora_kernels import NF4Weight, half, int8_rows, native, nf4_pieces, prepare_nf4
from manylora_kernels import selected_backend as backend_of
from manylora_server.core.types import Precision
from manylora_server.model.half_linear import PORTABLE, HalfEmbedding, HalfLinear
from manylora_server.model.int8_linear import Int8Linear
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear, can_pack
from manylora_store.compiler.canonical import ModuleSpec

_NF4_BYTES = 0.5 + 4 / nf4_pieces.BLOCK_SIZE


class Storage(Protocol):
    """A weight on its way. Rows come in order, in multiples of 16 but for the last ones."""

    def store(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Keep float32 ``rows`` as ``W[start:start + n]``; return what they are once rounded."""

    def finish(self, bias: torch.Tensor | None) -> nn.Module:
        """Return the module with all rows, and ``bias`` if it is a linear one."""


class HalfStorage:
    """bfloat16 in the tiles of ``HalfLinear`` and ``HalfEmbedding``."""

    def __init__(self, spec: ModuleSpec, device: torch.device) -> None:
        self._spec = spec
        self._weight = half.blank(spec.shape[0], spec.shape[1], torch.bfloat16, device)

    def store(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``Storage``."""
        half.store_rows(self._weight, start, rows)
        return rows.to(torch.bfloat16).float()

    def finish(self, bias: torch.Tensor | None) -> nn.Module:
        """See ``Storage``."""
        if self._spec.kind == "embedding":
            return HalfEmbedding(self._weight)
        return HalfLinear(self._weight, bias)


class DenseStorage:
    """Plain rows in ``dtype``; on a CPU they are packed for oneDNN once they are complete."""

    def __init__(self, spec: ModuleSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec = spec
        self._weight = torch.empty(spec.shape, dtype=dtype, device=device)

    def store(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``Storage``."""
        kept = self._weight[start : start + rows.shape[0]]
        kept.copy_(rows)
        return kept.float()

    def finish(self, bias: torch.Tensor | None) -> nn.Module:
        """See ``Storage``."""
        weight = nn.Parameter(self._weight, requires_grad=False)
        rows, columns = self._spec.shape
        if self._spec.kind == "embedding":
            return nn.Embedding(rows, columns, _weight=weight, _freeze=True)
        if can_pack(weight.dtype, weight.device):
            return PackedLinear(self._weight, bias)
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = weight
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        return linear


class Int8Storage:
    """Eight bits with a scale for every row."""

    def __init__(self, spec: ModuleSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._weight = int8_rows.blank(spec.shape[0], spec.shape[1], device)

    def store(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``Storage``."""
        return int8_rows.store_rows(self._weight, start, rows)

    def finish(self, bias: torch.Tensor | None) -> nn.Module:
        """See ``Storage``."""
        return Int8Linear(self._weight, None if bias is None else bias.to(self._dtype), self._dtype)


class NF4Storage:
    """NF4 with plain block maxima, in the layout of the selected backend."""

    def __init__(self, spec: ModuleSpec, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: list[NF4Weight] = []

    def store(self, start: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``Storage``."""
        part = nf4_pieces.quantize_rows(rows)
        self._parts.append(prepare_nf4(part))
        return nf4_pieces.read_rows(part, 0, rows.shape[0])

    def finish(self, bias: torch.Tensor | None) -> nn.Module:
        """See ``Storage``."""
        weight = nf4_pieces.join_rows(self._parts)
        return NF4Linear(weight, None if bias is None else bias.to(self._dtype))


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """Where twins of ``precision`` keep weights, on this device and processor.

    ``dense`` is the dtype of dense weights: embeddings' always, and linear ones' with ``bf16``.
    """

    precision: Precision
    dense: torch.dtype
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, precision: Precision, dtype: torch.dtype, device: torch.device) -> StoragePlan:
        """Choose: 16 bits, but float32 where a CPU has no kernels that widen in registers."""
        dense = dtype
        if device.type == "cpu" and dtype == torch.float32 and _widens():
            dense = torch.bfloat16
        return cls(precision, dense, dtype, device)

    @property
    def name(self) -> str:
        """What linear weights are kept as."""
        if self.precision != "bf16":
            return self.precision
        return str(self.dense).removeprefix("torch.")

    def storage(self, spec: ModuleSpec) -> Storage:
        """Return an empty storage for the module's weight."""
        if spec.kind == "linear" and self.precision == "int8":
            return Int8Storage(spec, self.dtype, self.device)
        if spec.kind == "linear" and self.precision == "nf4":
            return NF4Storage(spec, self.dtype)
        if self.dense != self.dtype:
            return HalfStorage(spec, self.device)
        return DenseStorage(spec, self.dense, self.device)

    def bytes(self, spec: ModuleSpec) -> int:
        """Return the memory that the module's own weights will take."""
        count = 1
        for size in spec.shape:
            count *= size
        if spec.kind == "norm":
            own = sum(_elements(shape) for shape in spec.parameters.values())
            return own * self.dtype.itemsize
        if spec.kind == "linear" and self.precision == "int8":
            return count + 4 * spec.shape[0]
        if spec.kind == "linear" and self.precision == "nf4":
            return int(count * _NF4_BYTES)
        return count * self.dense.itemsize


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a finished module that take memory."""
    if isinstance(module, NF4Linear):
        return module.weight_nf4.tensors
    if isinstance(module, HalfLinear | HalfEmbedding):
        return [module.weight_half.tiles]
    if isinstance(module, Int8Linear):
        return [module.weight_int8.tiles]
    return [*module.parameters(), *([module.weight] if isinstance(module, PackedLinear) else [])]


def with_parameters(base: nn.Module, parameters: Any, like: Callable[[Any], Any]) -> nn.Module:
    """Return a module as ``base`` with other ``parameters``; all else is shared.

    ``like`` turns a given tensor into one of the base's dtype and device.
    """
    module = base.__class__.__new__(base.__class__)
    for name, value in base.__dict__.items():
        module.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    for name, tensor in parameters.items():
        module._parameters[name] = nn.Parameter(like(tensor), requires_grad=False)
    return module


def _widens() -> bool:
    return backend_of("half_linear") == native.NATIVE and native.library.isa != PORTABLE


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
