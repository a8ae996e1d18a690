"""The weights of a merged checkpoint, written shard by shard and a few rows at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_server.core.errors import InvalidRequestError
from manylora_server.export import nf4
from manylora_server.export.job import ExportDtype
from manylora_server.export.naming import Naming
from manylora_server.export.plan import MergedTensor, MergePlan
from manylora_server.export.progress import Progress
from manylora_store.export.tensor_files import TensorFileWriter, TensorForm

DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
MAX_SHARD_BYTES = 5 * 10**9

_INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_BLOCK_BYTES = 8 * 2**20
"""Of float32 rows that are merged at a time."""


@dataclass(frozen=True, slots=True)
class FileTensors:
    """What becomes of one merged tensor: what is in the file by name; ``packed`` if in 4 bits."""

    tensor: MergedTensor
    forms: Mapping[str, TensorForm]
    packed: bool

    @property
    def bytes(self) -> int:
        """Their size together."""
        return sum(form.bytes for form in self.forms.values())


class WeightFiles:
    """The files of a plan in ``dtype``; ``nf4`` leaves what is no linear layer in ``dense``.

    ``bytes`` is what all files take, ``data_bytes`` what the tensors in them do.
    """

    def __init__(
        self,
        plan: MergePlan,
        dtype: ExportDtype,
        dense: torch.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.dense = DTYPES.get(dtype, dense)
        self.skipped: tuple[str, ...] = ()
        packed: frozenset[str] = frozenset()
        if dtype == "nf4":
            packed, self.skipped = packed_modules(plan.naming)
        self.transposed = {
            name for name, m in plan.naming.model.named_modules() if isinstance(m, Conv1D)
        }
        tensors = sorted(plan.tensors, key=lambda tensor: _natural(tensor.name))
        entries = {tensor.name: self._entry(tensor, packed) for tensor in tensors}
        split = split_state_dict_into_shards_factory(
            entries,
            get_storage_size=lambda entry: entry.bytes,
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_bytes,
        )
        self.shards: dict[str, list[FileTensors]] = {
            file: [entries[name] for name in names]
            for file, names in split.filename_to_tensors.items()
        }
        self.bytes = sum(self._writer(Path(file)).bytes for file in self.shards)
        self.data_bytes = sum(entry.bytes for entry in entries.values())
        self.packed = sum(entry.packed for entry in entries.values())

    def write(self, folder: Path, progress: Progress) -> None:
        """Write all files into ``folder``; ``progress`` is told the bytes as they come.

        Raises:
            OSError: the disk is full, or the like.
            InvalidRequestError: a value does not fit the dtype.
            CancelledError: as ``progress`` does.
        """
        for file in self.shards:
            with self._writer(folder / file) as writer:
                for entry in self.shards[file]:
                    if entry.packed:
                        self._write_packed(entry, writer, progress)
                    else:
                        self._write_dense(entry, writer, progress)
        if len(self.shards) > 1:
            self._write_index(folder / _INDEX)

    def _entry(self, tensor: MergedTensor, packed: frozenset[str]) -> FileTensors:
        module, _, slot = tensor.parameter.rpartition(".")
        if slot == "weight" and module in packed:
            shape = tensor.shape[::-1] if module in self.transposed else tensor.shape
            return FileTensors(tensor, nf4.forms(tensor.name, shape), packed=True)
        dtype = self.dense if tensor.dtype.is_floating_point else tensor.dtype
        return FileTensors(tensor, {tensor.name: TensorForm(dtype, tensor.shape)}, packed=False)

    def _writer(self, path: Path) -> TensorFileWriter:
        forms: dict[str, TensorForm] = {}
        for entry in self.shards[path.name]:
            forms |= entry.forms
        return TensorFileWriter(path, forms)

    def _write_dense(
        self, entry: FileTensors, writer: TensorFileWriter, progress: Progress
    ) -> None:
        tensor = entry.tensor
        form = entry.forms[tensor.name]
        with tensor.opened() as rows:
            if not form.shape:
                writer.write(tensor.name, rows(0, 1).reshape(()).to(form.dtype))
                progress.advance(form.bytes)
                return
            columns = max(1, form.row_bytes // form.dtype.itemsize)
            step = max(1, _BLOCK_BYTES // (4 * columns))
            for start in range(0, form.shape[0], step):
                block = rows(start, min(start + step, form.shape[0]))
                cast = block.to(form.dtype)
                _check_finite(tensor, block, cast)
                writer.write(tensor.name, cast, start)
                progress.advance(cast.numel() * cast.element_size())

    def _write_packed(
        self, entry: FileTensors, writer: TensorFileWriter, progress: Progress
    ) -> None:
        tensor = entry.tensor
        with tensor.opened() as rows:
            merged = rows(0, tensor.shape[0])
        weight = merged.to(self.dense)
        _check_finite(tensor, merged, weight)
        del merged
        if tensor.parameter.rpartition(".")[0] in self.transposed:
            weight = weight.T
        for name, part in nf4.pack(tensor.name, weight.contiguous()).items():
            writer.write(name, part)
        progress.advance(entry.bytes)

    def _write_index(self, path: Path) -> None:
        weight_map = {
            name: file
            for file, entries in self.shards.items()
            for entry in entries
            for name in entry.forms
        }
        metadata = {"total_size": self.data_bytes}
        index: dict[str, Any] = {"metadata": metadata, "weight_map": weight_map}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def packed_modules(naming: Naming) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the modules that transformers holds in 4 bits, and the linear ones that it does not.

    These are the output head, whose precision shows most, and what is tied to it.
    """
    model = naming.model
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
    skipped = tuple(name for name, module in linear.items() if module is head)
    return frozenset(linear) - set(skipped), skipped


def _check_finite(tensor: MergedTensor, rows: torch.Tensor, cast: torch.Tensor) -> None:
    """Refuse values that merging or a narrower dtype has made infinite."""
    if not (tensor.merged or cast.dtype == torch.float16):
        return
    lost = int((rows.isfinite() & ~cast.isfinite()).sum())
    if lost:
        raise InvalidRequestError(
            f"dtype: {lost} values of {tensor.name!r} are too large for "
            f"{str(cast.dtype).removeprefix('torch.')}; choose a wider one.",
            param="dtype",
        )
    bad = int((~rows.isfinite()).sum()) if tensor.merged else 0
    if bad:
        raise InvalidRequestError(
            f"adapters: with these weights {bad} values of {tensor.name!r} are not finite.",
            param="adapters",
        )


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)
