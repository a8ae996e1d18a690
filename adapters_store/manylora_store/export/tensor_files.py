"""safetensors files read and written a few rows at a time, so that neither has to fit in memory.

The format is described in ``checkpoint.header``, which reads adapters' files only. Reading is by
plain system calls and not by mapping the file, whose pages would count as this process's memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from manylora_store.checkpoint.header import LENGTH_BYTES

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
# A file system that cannot reserve space says one of these; then a full disk shows at a write.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """The size of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    form: TensorForm
    offset: int

    def read(self) -> torch.Tensor:
        """Return the tensor, in memory of its own. ``OSError`` if the file cannot be read."""
        return self._read(self.form.shape, self.offset)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return indices ``start`` to ``stop`` of the first dimension."""
        shape = (stop - start, *self.form.shape[1:])
        return self._read(shape, self.offset + start * self.form.row_bytes)

    def _read(self, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.form.dtype)
        buffer = _bytes(tensor)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, f"{self.path.name} ends within a tensor")
                done += count
        finally:
            os.close(descriptor)
        return tensor


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of the file at ``path`` by name.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be read, or is no safetensors file.
        ValueError: it holds a dtype that is not known here.
    """
    with safe_open(path, framework="pt"):
        pass  # The library's own checks: nothing below looks at a broken file.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name!r} of {path.name} has dtype {entry['dtype']}")
        form = TensorForm(dtype, tuple(entry["shape"]))
        found[name] = StoredTensor(path, form, LENGTH_BYTES + length + entry["data_offsets"][0])
    return found


class TensorFileWriter:
    """Writes one new safetensors file whose tensors are known by ``forms``; a context manager.

    Space for all of it is reserved at the start, so that a full disk shows then. Rows may come in
    any order. At the end of the block the file is on the disk.

    Raises:
        OSError: from every method; the file is left to whoever removes the folder.
    """

    def __init__(self, path: Path, forms: Mapping[str, TensorForm]) -> None:
        self._path = path
        self._forms = forms
        # Wide dtypes first: then every tensor lies at a multiple of its own width.
        order = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name in order:
            form = forms[name]
            self._offsets[name] = end
            header[name] = {
                "dtype": _NAMES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [end, end + form.bytes],
            }
            end += form.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = len(text).to_bytes(LENGTH_BYTES, "little") + text
        self.bytes = len(self._header) + end
        self._descriptor = -1

    def __enter__(self) -> TensorFileWriter:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o666)
        try:
            try:
                os.posix_fallocate(self._descriptor, 0, self.bytes)
            except OSError as error:
                if error.errno not in _CANNOT_RESERVE:
                    raise
            self._write(memoryview(self._header), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, name: str, rows: torch.Tensor, start: int = 0) -> None:
        """Write ``rows``, of the tensor's dtype, at index ``start`` of its first dimension."""
        form = self._forms[name]
        assert rows.dtype == form.dtype, f"{name}: {rows.dtype} is not {form.dtype}"
        place = len(self._header) + self._offsets[name] + start * form.row_bytes
        self._write(_bytes(rows.contiguous()), place)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return data
