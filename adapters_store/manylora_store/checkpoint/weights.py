"""The weight file of an adapter folder: what it holds, and its bytes as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from manylora_store.errors import AdapterInvalidError

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
LFS_MAGIC = b"version https://git-lfs.github.com/spec"
# A pickle can hold many views of one small storage; honest files tie two tensors at most.
MAX_BIN_EXPANSION = 4

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (torch's name for it) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One readable weight file; ``header`` lists its tensors, sorted by name."""

    path: Path
    size: int
    header: Mapping[str, TensorInfo]

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor in the dtype it is stored in, in the header's order.

        Raises:
            AdapterInvalidError: the file cannot be read.
        """
        if self.path.name == BIN_NAME:
            tensors = _load_bin(self.path)
            yield from ((name, tensors[name].contiguous()) for name in self.header)
            return
        with _open_safetensors(self.path) as file:
            for name in self.header:
                yield name, file.get_tensor(name)

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed name, dtype, shape and bytes of every tensor to ``digest``, in the header's order.

        The same tensors give the same digest from either file format.
        """
        for name, tensor in self.iterate():
            info = self.header[name]
            digest.update(
                f"{len(name)}:{name}|{info.dtype}|{list(info.shape)}|".encode(
                    errors="backslashreplace"
                )
            )
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def open_weights(folder: Path) -> WeightFile:
    """Find the weight file of ``folder`` and read its header.

    ``adapter_model.safetensors`` is preferred, as in PEFT; ``adapter_model.bin`` is unpickled with
    ``weights_only=True``.

    Raises:
        AdapterInvalidError: no file, a Git LFS pointer, a truncated or corrupt file, no tensors, or
            a tensor that is not of a floating-point dtype.
    """
    path = folder / SAFETENSORS_NAME
    if not path.is_file():
        path = folder / BIN_NAME
    if not path.is_file():
        raise AdapterInvalidError(
            f"no weights: neither {SAFETENSORS_NAME} nor {BIN_NAME} is in the folder"
        )
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            magic = file.read(len(LFS_MAGIC))
    except OSError as error:
        raise AdapterInvalidError(f"{path.name} cannot be read: {error.strerror}") from error
    if magic == LFS_MAGIC:
        raise AdapterInvalidError(
            f"{path.name} is a Git LFS pointer of {size} bytes, not the weights; fetch them"
            " with `git lfs pull`"
        )
    header = _bin_header(path, size) if path.name == BIN_NAME else _safetensors_header(path)
    if not header:
        raise AdapterInvalidError(f"{path.name} holds no tensors")
    return WeightFile(path=path, size=size, header=dict(sorted(header.items())))


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise AdapterInvalidError(
            f"{path.name} ({path.stat().st_size} bytes) is truncated or not a safetensors file:"
            f" {error}"
        ) from error


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    header = {}
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
            entry = file.get_slice(name)
            stored = entry.get_dtype()
            if stored not in _SAFETENSORS_DTYPES:
                raise _bad_dtype(path, name, stored)
            header[name] = TensorInfo(tuple(entry.get_shape()), _SAFETENSORS_DTYPES[stored])
    return header


def _bin_header(path: Path, size: int) -> dict[str, TensorInfo]:
    tensors = _load_bin(path)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > MAX_BIN_EXPANSION * size:
        raise AdapterInvalidError(
            f"{path.name} has {size} bytes but its tensors would take {total}"
        )
    header = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _SAFETENSORS_DTYPES.values():
            raise _bad_dtype(path, name, dtype)
        header[name] = TensorInfo(tuple(tensor.shape), dtype)
    return header


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterInvalidError(
            f"{path.name} ({path.stat().st_size} bytes) cannot be read as plain weights:"
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
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _bad_dtype(path: Path, name: str, dtype: str) -> AdapterInvalidError:
    return AdapterInvalidError(
        f"{path.name}: tensor {name!r} has dtype {dtype}; expected one of"
        f" {', '.join(_SAFETENSORS_DTYPES.values())}"
    )
