"""``adapter_model.bin``, a pickle, into safetensors. The one place that unpickles anything.

torch is imported when a file is converted, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from manylora_store.checkpoint.header import DTYPES, LENGTH_BYTES
from manylora_store.checkpoint.weights import LFS_MAGIC, refuse_lfs_pointer
from manylora_store.checkpoint.zip_directory import ZIP_MAGIC, open_zip
from manylora_store.errors import AdapterInvalidError

if TYPE_CHECKING:
    import torch

MAX_EXPANSION = 4
"""A pickle can hold many views of one small storage; honest files tie two tensors at most."""

_MAX_DIRECTORY_BYTES = 16 * 2**20
_STORED = 0


class Writable(Protocol):
    """Where a converted file goes."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take all of ``data``."""


def convert_bin(path: Path, out: Writable) -> None:
    """Write the tensors of the pickle ``path`` to ``out`` as a safetensors file.

    The content, and so the digest of the adapter, stays the same. The file is unpickled with
    ``weights_only=True``: nothing in it is called. One tensor at a time is held in memory, the file
    itself is mapped (files of torch before 1.6 are read whole).

    Raises:
        AdapterInvalidError: a Git LFS pointer, a truncated or corrupt file, a pickle of anything
            but tensors by name, no tensors, or a tensor that is not dense and floating-point.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(len(LFS_MAGIC))
    except OSError as error:
        raise AdapterInvalidError(f"{path.name} cannot be read: {error.strerror}") from error
    refuse_lfs_pointer(path.name, beginning, size)
    is_zip = beginning.startswith(ZIP_MAGIC)
    if is_zip:
        _refuse_compression(path, size)
    tensors = _load(path, size, mapped=is_zip)
    _check(path, size, tensors)
    _write(tensors, out)


def _refuse_compression(path: Path, size: int) -> None:
    """torch stores plainly, and inflates what is not stored plainly without any limit."""
    with open_zip(path, _MAX_DIRECTORY_BYTES) as archive:
        members = archive.infolist()
    if any(member.compress_type != _STORED for member in members):
        raise AdapterInvalidError(f"{path.name} cannot be read as plain weights: it is compressed")
    total = sum(member.file_size for member in members)
    if total > size:
        raise AdapterInvalidError(
            f"{path.name} cannot be read as plain weights: it has {size} bytes, and its members"
            f" are said to have {total}"
        )


def _load(path: Path, size: int, *, mapped: bool) -> Mapping[str, torch.Tensor]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise AdapterInvalidError(
            f"{path.name} ({size} bytes) cannot be read as plain weights:"
            f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(loaded, dict):
        raise AdapterInvalidError(
            f"{path.name} holds a {type(loaded).__name__}; a dictionary of tensors is expected"
        )
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterInvalidError(
                f"{path.name}: entry {name!r} is a {type(tensor).__name__}; a tensor is expected"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise AdapterInvalidError(
                f"{path.name}: tensor {name!r} has layout {tensor.layout} on {tensor.device};"
                " a dense tensor is expected"
            )
    return {name: loaded[name].detach() for name in sorted(loaded)}


def _check(path: Path, size: int, tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise AdapterInvalidError(f"{path.name} holds no tensors")
    known = {dtype for dtype, _ in DTYPES.values()}
    for name, tensor in tensors.items():
        if _dtype(tensor) not in known:
            raise AdapterInvalidError(
                f"{path.name}: tensor {name!r} has dtype {_dtype(tensor)}; expected one of"
                f" {', '.join(dtype for dtype, _ in DTYPES.values())}"
            )
    total = sum(_size(tensor) for tensor in tensors.values())
    if total > MAX_EXPANSION * size:
        raise AdapterInvalidError(
            f"{path.name} has {size} bytes but its tensors would take {total}"
        )


def _write(tensors: Mapping[str, torch.Tensor], out: Writable) -> None:
    import torch

    spelled = {dtype: stored for stored, (dtype, _) in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _size(tensor)
        header[name] = {
            "dtype": spelled[_dtype(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    out.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for tensor in tensors.values():
        plain = tensor.resolve_neg().contiguous().view(-1)
        if plain.numel():
            out.write(plain.view(torch.uint8).numpy().data)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
