"""Safetensors headers: whatever lies is refused, and what is accepted means the same elsewhere."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from manylora_store.checkpoint.folder import open_folder, open_stored
from manylora_store.checkpoint.header import DTYPES, MAX_HEADER_BYTES
from manylora_store.checkpoint.tensors import read_tensors
from manylora_store.checkpoint.weights import open_weights
from manylora_store.errors import AdapterInvalidError
from unit.store.intake_support import (
    CONFIG,
    WEIGHTS,
    adapter_files,
    entry,
    random_tensors,
    safetensors,
    write_one_of_each_dtype,
)

A = entry("F32", [2], 0, 8)
SOUND = {"a": A, "b": entry("BF16", [2, 2], 8, 16)}
DATA = bytes(range(16))


def refuse(path: Path, content: bytes, *names: str) -> None:
    path.write_bytes(content)
    with pytest.raises(AdapterInvalidError) as caught:
        open_weights(path)
    for name in (path.name, *names):
        assert name in caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / WEIGHTS


def test_a_sound_file_is_what_the_others_are_broken_from(path: Path) -> None:
    path.write_bytes(safetensors(SOUND, DATA))
    weights = open_weights(path)
    assert list(weights.header) == ["a", "b"]
    assert weights.header["b"].offset == path.stat().st_size - 8


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length(path: Path, size: int) -> None:
    refuse(path, bytes(size), f"{size} bytes", "truncated")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 200])
def test_a_header_length_that_lies(path: Path, length: int) -> None:
    whole = safetensors(SOUND, DATA)
    refuse(path, struct.pack("<Q", length) + whole[8:], str(length), "truncated")


def test_a_header_of_an_absurd_length(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10**8 + 1))
        file.truncate(2 * 10**8)
    with pytest.raises(AdapterInvalidError, match=str(MAX_HEADER_BYTES)):
        open_weights(path)


@pytest.mark.parametrize("end", range(0, len(safetensors(SOUND, DATA)), 9))
def test_a_file_cut_anywhere(path: Path, end: int) -> None:
    refuse(path, safetensors(SOUND, DATA)[:end], "truncated")


def test_bytes_after_the_last_tensor(path: Path) -> None:
    refuse(path, safetensors(SOUND, DATA + b"x"), "1 bytes follow")


@pytest.mark.parametrize(
    "text",
    [
        b"[1, 2]",
        b'{"a": {',
        b'\t{"a": 1}',
        b'{"a": 1}\n',
        b'{"\xff": 1}',
        b"{" + b'"a":[' * 5000 + b"}",
        json.dumps(SOUND).encode("utf-16"),
    ],
)
def test_a_header_that_is_no_json_object(path: Path, text: bytes) -> None:
    refuse(path, safetensors(text, DATA), "header")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"a": %s, "b": %s, "a": %s}', "'a' twice"),
        ('{"a": %s, "b": {"shape": [2, 2], "shape": [4]}, "c": [%s, %s]}', "'shape' twice"),
    ],
)
def test_a_name_given_twice(path: Path, text: str, name: str) -> None:
    refuse(path, safetensors((text % ((json.dumps(A),) * 3)).encode(), DATA), name)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}])
def test_a_file_without_tensors(path: Path, header: dict[str, Any]) -> None:
    refuse(path, safetensors(header), "no tensors")


@pytest.mark.parametrize("metadata", [3, ["x"], {"a": 1}, {"a": "\ud800"}])
def test_metadata_that_is_not_text(path: Path, metadata: Any) -> None:
    refuse(path, safetensors({"__metadata__": metadata, **SOUND}, DATA), "__metadata__")


def test_a_tensor_name_that_is_half_a_character(path: Path) -> None:
    refuse(path, safetensors({"\ud800": A}, DATA[:8]), "Unicode")


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (entry("BF16", [2, 2], 4, 12), ("begins at byte 4", "8 is expected")),
        (entry("BF16", [2, 2], 0, 8), ("begins at byte 0",)),
        (entry("BF16", [2, 2], 10, 18), ("begins at byte 10",)),
        (entry("BF16", [2, 4], 8, 24), ("truncated", "24")),
        (entry("BF16", [2, 2], 8, 2**60), (str(2**60 - 8), "takes 8")),
        (entry("BF16", [3, 2], 8, 16), ("8 bytes", "takes 12")),
        (entry("BF16", [], 8, 16), ("takes 2",)),
        (entry("F32", [2, 2], 8, 16), ("float32", "takes 16")),
        (entry("BF16", [2, 2], 16, 8), ("data_offsets",)),
        (entry("BF16", [2, -2], 8, 16), ("shape", "-2")),
        (entry("BF16", [2, True], 8, 16), ("shape", "True")),
        ({**entry("BF16", [], 8, 16), "shape": 4}, ("shape",)),
        ({**entry("BF16", [], 8, 16), "shape": [2.0, 2]}, ("shape", "2.0")),
        ({**entry("BF16", [2, 2], 8, 16), "data_offsets": [8]}, ("data_offsets",)),
        (entry("BF16", [2**40, 0, 2**40], 8, 8), ("absurd",)),
        (entry("BF16", [10**4000] * 900, 8, 16), ("shape",)),
        (entry("BF16", [1] * 65, 8, 10), ("shape",)),
        (entry("I8", [8], 8, 16), ("I8", "float32")),
        (entry("I64", [1], 8, 16), ("I64",)),
        (entry("BOOL", [8], 8, 16), ("BOOL",)),
        ({**A, "dtype": ["F32"]}, ("dtype",)),
        ({"dtype": "F32", "shape": [2]}, ("data_offsets",)),
        ({**A, "strides": [1]}, ("data_offsets",)),
        (None, ("data_offsets",)),
    ],
)
def test_a_tensor_described_wrongly(path: Path, other: Any, names: tuple[str, ...]) -> None:
    refuse(path, safetensors({"a": A, "b": other}, DATA), *names)
    if "truncated" not in names:
        assert "'b'" in _message(path) or "'a'" in _message(path)


def _message(path: Path) -> str:
    with pytest.raises(AdapterInvalidError) as caught:
        open_weights(path)
    return caught.value.message


_small = st.integers(-1, 12)
_dtypes = st.sampled_from([*DTYPES, "I32", "C64", ""])
_entries = st.fixed_dictionaries(
    {
        "dtype": _dtypes,
        "shape": st.lists(_small, max_size=3) | _small,
        "data_offsets": st.lists(_small, min_size=1, max_size=3),
    }
)


@st.composite
def _files(draw: st.DrawFn) -> bytes:
    """Mostly sound files: tensors one after the other, then perhaps something changed."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcdé"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + math.prod(shape) * DTYPES[dtype][1]
        header[name] = entry(dtype, shape, begin, end)
    if draw(st.booleans()):
        header |= draw(st.dictionaries(st.sampled_from(["a", "z", "__metadata__"]), _entries))
    content = bytearray(safetensors(header, bytes(end)))
    if draw(st.booleans()):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
    return bytes(content)


@settings(deadline=None, max_examples=300)
@given(_files())
def test_what_is_accepted_the_safetensors_library_reads_the_same(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(content)
        try:
            weights = open_weights(path)
        except AdapterInvalidError as error:
            assert WEIGHTS in error.message  # noqa: PT017
            return
        with safe_open(path, framework="pt") as file:
            assert sorted(file.keys()) == list(weights.header)
            for name, tensor in read_tensors(weights):
                expected = file.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
                assert tensor.view(-1).view(torch.uint8).equal(expected.view(-1).view(torch.uint8))


def test_every_dtype_is_read_as_it_was_saved(path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in random_tensors().items()}
    tensors |= {dtype: torch.randn(3, 5).to(getattr(torch, dtype)) for dtype, _ in DTYPES.values()}
    save_file(tensors, path, metadata={"format": "pt"})
    read = dict(read_tensors(open_weights(path)))
    path.unlink()
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].to(torch.float64).equal(tensor.to(torch.float64))


def test_a_file_that_becomes_shorter_while_it_is_read(path: Path) -> None:
    path.write_bytes(safetensors(SOUND, DATA))
    weights = open_weights(path)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(AdapterInvalidError, match="truncated"):
        dict(read_tensors(weights))
    with pytest.raises(AdapterInvalidError, match="truncated"):
        weights.update_digest(hashlib.sha256())


def test_a_stored_adapter_is_opened_under_other_names_without_its_digest(tmp_path: Path) -> None:
    adapter_files(tmp_path)
    original = open_folder(tmp_path, "a", "file:x")
    config, weights = tmp_path / ("c" * 64), tmp_path / ("d" * 64)
    (tmp_path / CONFIG).rename(config)
    (tmp_path / WEIGHTS).rename(weights)
    stored = open_stored(config, weights, name="b", source="file:y", digest="e" * 64)
    assert (stored.name, stored.source, stored.digest) == ("b", "file:y", "e" * 64)
    assert stored.config == original.config
    assert stored.weights.header == original.weights.header
    assert stored.weights.header_digest == original.weights.header_digest
    assert [t.tolist() for _, t in read_tensors(stored.weights)]
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(AdapterInvalidError, match="truncated"):
        open_stored(config, weights, name="b", source="file:y", digest="e" * 64)


def test_memory_for_the_digest_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write_one_of_each_dtype(tmp_path)
    size = 48 * 2**20
    content = safetensors({"base_model.model.a": entry("F32", [size // 4], 0, size)})
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(content)
        file.truncate(len(content) + size)
    tracemalloc.start()
    open_folder(tmp_path, "a", "file:x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
