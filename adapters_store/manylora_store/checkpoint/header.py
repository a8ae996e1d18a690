"""The header of a safetensors file, read strictly. Imports neither torch nor peft.

A safetensors file is the header's length (8 bytes, little-endian), the header (a JSON object that
gives each tensor a dtype, a shape and a range of bytes, padded with spaces), and the data. What is
accepted here the safetensors library accepts too, and reads the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 32 * 2**20
"""Room for 200,000 tensors. The format's own 100 MB could make gigabytes of Python objects."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
"""safetensors' name of each accepted dtype to torch's name and the bytes of one value."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMENSIONS = 64
_MAX_VALUES = 2**62


class HeaderError(ValueError):
    """The header is broken; the message says how, and the caller which file it is."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (torch's name for it) of one stored tensor, and where its bytes are.

    ``offset`` counts bytes from the beginning of the file, ``size`` is the number of bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


def header_length(prefix: bytes, file_size: int) -> int:
    """Return the header's length in bytes, given the first eight bytes of the file.

    Raises:
        HeaderError: the file is too short, or the length cannot be true.
    """
    if len(prefix) < LENGTH_BYTES:
        raise HeaderError("it is truncated: a safetensors file begins with 8 bytes of length")
    length = int.from_bytes(prefix, "little")
    present = file_size - LENGTH_BYTES
    if length > present:
        raise HeaderError(
            f"it is truncated or no safetensors file: it claims a header of {length} bytes, and"
            f" {present} follow"
        )
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"its header takes {length} bytes; at most {MAX_HEADER_BYTES} are accepted"
        )
    return length


def parse_header(text: bytes, file_size: int) -> dict[str, TensorInfo]:
    """Return the tensors that the header ``text`` describes, sorted by name.

    Their bytes fill the file from the header's end to the file's, each byte in one tensor.

    Raises:
        HeaderError: not such a header; the message names the tensor where one is at fault.
    """
    begin = LENGTH_BYTES + len(text)
    entries = _entries(text)
    ranges: list[tuple[int, int, str]] = []
    header = {}
    for name in sorted(entries):
        shape, dtype, start, stop = _tensor(name, entries[name])
        header[name] = TensorInfo(shape, dtype, begin + start, stop - start)
        ranges.append((start, stop, name))
    _check_ranges(ranges, file_size - begin)
    return header


def _entries(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise HeaderError("it is no safetensors file: its header is not a JSON object")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not valid JSON: {error}") from error
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _is_text(key) and _is_text(value)
        for key, value in metadata.items()
    ):
        raise HeaderError(f"{_METADATA} of its header is not an object of strings")
    if not entries:
        raise HeaderError("it holds no tensors")
    return dict(entries)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise HeaderError(f"its header gives {name!r} twice")
        found[name] = value
    return found


def _tensor(name: str, entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    if not _is_text(name):
        raise HeaderError(f"the name of tensor {name!r} is not valid Unicode")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise HeaderError(f"tensor {name!r} is not described by {', '.join(sorted(_FIELDS))}")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(stored, str) or stored not in DTYPES:
        raise HeaderError(
            f"tensor {name!r} has dtype {stored}; expected one of"
            f" {', '.join(dtype for dtype, _ in DTYPES.values())}"
        )
    dtype, width = DTYPES[stored]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(f"tensor {name!r} has shape {_short(shape)}; a list of sizes is expected")
    if math.prod(size or 1 for size in shape) > _MAX_VALUES:
        raise HeaderError(f"tensor {name!r} has the absurd shape {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(
            f"tensor {name!r} has data_offsets {_short(offsets)}; a begin and an end are expected"
        )
    needed, given = math.prod(shape) * width, offsets[1] - offsets[0]
    if needed != given:
        raise HeaderError(
            f"tensor {name!r} has {given} bytes; its shape {shape} in {dtype} takes {needed}"
        )
    return tuple(shape), dtype, offsets[0], offsets[1]


def _check_ranges(ranges: list[tuple[int, int, str]], data_size: int) -> None:
    """Hold the byte ranges to "one after the other, from the first byte to the last"."""
    end = 0
    for start, stop, name in sorted(ranges):
        if start != end:
            raise HeaderError(
                f"tensor {name!r} begins at byte {start} of the data; {end} is expected, since"
                " tensors neither overlap nor leave holes"
            )
        if stop > data_size:
            raise HeaderError(
                f"it is truncated: tensor {name!r} ends at byte {stop} of the data, which has"
                f" {data_size}"
            )
        end = stop
    if end != data_size:
        raise HeaderError(f"{data_size - end} bytes follow its last tensor")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < _MAX_VALUES for value in values
    )


def _is_text(value: str) -> bool:
    """Whether a string from JSON can be UTF-8 (an escape can spell half a surrogate pair)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
