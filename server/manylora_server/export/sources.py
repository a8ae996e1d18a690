"""The tensors of a base's checkpoint on disk, whatever form they have there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from manylora_kernels import NF4Weight
from manylora_server.core.errors import InvalidRequestError
from manylora_store.export.tensor_files import StoredTensor, TensorForm, stored_tensors

Rows = Callable[[int, int], torch.Tensor]

_QUANT_STATE = "quant_state.bitsandbytes__"
_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
_PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")


class Source(Protocol):
    """A tensor of the checkpoint, in the form that a dense checkpoint would have."""

    @property
    def form(self) -> TensorForm:
        """Its dtype and shape."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return indices ``start`` to ``stop`` of the first dimension."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor of a ``.bin`` file, which torch maps into memory and reads as it is used."""

    tensor: torch.Tensor

    @property
    def form(self) -> TensorForm:
        """See ``Source``."""
        return TensorForm(self.tensor.dtype, tuple(self.tensor.shape))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See ``Source``."""
        return self.tensor[start:stop].clone()


class PackedTensor:
    """A weight that bitsandbytes has packed in 4 bits; unpacked as a whole, within ``unpacked``.

    ``transposed`` is for layers that a dense checkpoint stores as ``[in, out]``.
    """

    def __init__(
        self, packed: StoredTensor, parts: Mapping[str, StoredTensor], transposed: bool
    ) -> None:
        self._packed = packed
        self._parts = parts
        self._transposed = transposed
        state = next(name for name in parts if name.startswith(_QUANT_STATE))
        self._state: dict[str, Any] = json.loads(bytes(parts[state].read().tolist()))
        rows, columns = self._state["shape"]
        shape = (columns, rows) if transposed else (rows, columns)
        self.form = TensorForm(getattr(torch, self._state["dtype"]), shape)
        self._dense: torch.Tensor | None = None

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Keep the dense weight, in float32, while the block runs."""
        self._dense = self._dequantize()
        try:
            yield
        finally:
            self._dense = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See ``Source``."""
        dense = self._dequantize() if self._dense is None else self._dense
        return dense[start:stop].clone()

    def _dequantize(self) -> torch.Tensor:
        # Not by bitsandbytes, whose operator on CPUs errs for some shapes (decision 3).
        state = self._state
        nested = "nested_absmax" in self._parts
        weight = NF4Weight(
            packed=self._packed.read(),
            code=self._parts["quant_map"].read(),
            absmax=self._parts["absmax"].read(),
            shape=tuple(state["shape"]),
            block_size=state["blocksize"],
            quant_type=state["quant_type"],
            absmax_code=self._parts["nested_quant_map"].read() if nested else None,
            absmax_scale=self._parts["nested_absmax"].read() if nested else None,
            absmax_offset=state.get("nested_offset", 0.0),
            absmax_block_size=state.get("nested_blocksize", 256),
        ).dequantize()
        return weight.T.contiguous() if self._transposed else weight


@contextmanager
def reading(source: Source) -> Iterator[Rows]:
    """Yield what gives rows of ``source``, any number of times."""
    if isinstance(source, PackedTensor):
        with source.unpacked():
            yield source.rows
    else:
        yield source.rows


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor] | dict[str, PickledTensor]:
    """Return the tensors of the checkpoint in ``folder``, by transformers' choice of files.

    Raises:
        InvalidRequestError: there are no weights, or a file of them cannot be read.
    """
    try:
        for names, read in ((_SAFETENSORS, stored_tensors), (_PICKLES, _pickled_tensors)):
            files = _files(folder, *names)
            if files:
                found: dict[str, Any] = {}
                for path in files:
                    found |= read(path)
                return found
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidRequestError(
            f"MODEL: the weights in {folder} cannot be read: {error}", param="model"
        ) from error
    raise InvalidRequestError(
        f"MODEL: {folder} holds no weights; expected is one of "
        f"{', '.join((*_SAFETENSORS, *_PICKLES))}.",
        param="model",
    )


def grouped(
    tensors: Mapping[str, StoredTensor],
) -> dict[str, tuple[StoredTensor, dict[str, StoredTensor]]]:
    """Return each tensor with the parts that bitsandbytes has stored beside it."""
    owners = {
        name.partition(f".{_QUANT_STATE}")[0] for name in tensors if f".{_QUANT_STATE}" in name
    }
    groups: dict[str, tuple[StoredTensor, dict[str, StoredTensor]]] = {}
    parts: dict[str, dict[str, StoredTensor]] = {owner: {} for owner in owners}
    for name, tensor in tensors.items():
        owner = next((o for o in _ancestors(name) if o in owners), None)
        if owner is None:
            groups[name] = (tensor, {})
        elif name == owner:
            groups[name] = (tensor, parts[owner])
        else:
            parts[owner][name.removeprefix(f"{owner}.")] = tensor
    return groups


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _files(folder: Path, index: str, single: str) -> list[Path]:
    if (folder / index).is_file():
        mapping = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        return sorted(folder / name for name in set(mapping.values()))
    return [folder / single] if (folder / single).is_file() else []


def _pickled_tensors(path: Path) -> dict[str, PickledTensor]:
    # Only tensors are unpickled; files older than torch 1.6 cannot be mapped.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: PickledTensor(tensor) for name, tensor in state.items()}
