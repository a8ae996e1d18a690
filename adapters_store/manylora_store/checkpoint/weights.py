"""The weight file of an adapter: its header, and its bytes. Imports neither torch nor peft."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora_store.checkpoint.header import (
    LENGTH_BYTES,
    HeaderError,
    TensorInfo,
    header_length,
    parse_header,
)
from manylora_store.errors import AdapterInvalidError

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
LFS_MAGIC = b"version https://git-lfs.github.com/spec"
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One readable safetensors file; ``header`` lists its tensors, sorted by name.

    ``size`` is the file's in bytes. ``header_digest`` is the SHA-256 of the header as it is stored:
    two files with the same one differ in the values of their tensors only.
    """

    path: Path
    size: int
    header: Mapping[str, TensorInfo]
    header_digest: str

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed name, dtype, shape and bytes of every tensor to ``digest``, in the header's order.

        Raises:
            AdapterInvalidError: the file cannot be read, or has become shorter.
        """
        buffer = memoryview(bytearray(_CHUNK))
        with open_data(self.path) as file:
            for name, info in self.header.items():
                digest.update(f"{len(name)}:{name}|{info.dtype}|{list(info.shape)}|".encode())
                for start in range(0, info.size, _CHUNK):
                    chunk = buffer[: min(_CHUNK, info.size - start)]
                    file.read_into(chunk, info.offset + start)
                    digest.update(chunk)


class DataFile:
    """A file opened for reading at any offset; use as a context manager."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` (of bytes) from byte ``offset`` of the file on.

        Raises:
            AdapterInvalidError: the file cannot be read, or ends before.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise _unreadable(self._path, error) from error
            if count == 0:
                raise AdapterInvalidError(
                    f"{self._path.name} is truncated: it ends at byte {offset + done}, within a"
                    " tensor"
                )
            done += count


def open_data(path: Path) -> DataFile:
    """Open ``path`` for reading.

    Raises:
        AdapterInvalidError: it cannot be opened.
    """
    try:
        return DataFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise _unreadable(path, error) from error


def open_weights(path: Path) -> WeightFile:
    """Read the header of the safetensors file ``path`` and hold it against the file's size.

    Raises:
        AdapterInvalidError: a Git LFS pointer, a truncated or corrupt file, no tensors, or a tensor
            that is not of a floating-point dtype.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(len(LFS_MAGIC))
            refuse_lfs_pointer(path.name, prefix, size)
            length = header_length(prefix[:LENGTH_BYTES], size)
            file.seek(LENGTH_BYTES)
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    except HeaderError as error:
        raise _broken(path, size, error) from error
    try:
        header = parse_header(text, size)
    except HeaderError as error:
        raise _broken(path, size, error) from error
    return WeightFile(path, size, header, hashlib.sha256(text).hexdigest())


def refuse_lfs_pointer(name: str, beginning: bytes, size: int) -> None:
    """Raise ``AdapterInvalidError`` if a file that begins so is a Git LFS pointer."""
    if beginning.startswith(LFS_MAGIC):
        raise AdapterInvalidError(
            f"{name} is a Git LFS pointer of {size} bytes, not the file itself; fetch it"
            " with `git lfs pull`"
        )


def _unreadable(path: Path, error: OSError) -> AdapterInvalidError:
    return AdapterInvalidError(f"{path.name} cannot be read: {error.strerror}")


def _broken(path: Path, size: int, error: HeaderError) -> AdapterInvalidError:
    return AdapterInvalidError(f"{path.name} ({size} bytes) is not sound: {error}")
