"""``adapter_model.bin``: converted to the same content, and nothing in it is ever run."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_store.checkpoint.folder import open_folder
from manylora_store.checkpoint.pickled import convert_bin
from manylora_store.errors import AdapterInvalidError
from unit.store.intake_support import BIN, CONFIG, LFS_POINTER, WEIGHTS, random_tensors

KEY = "base_model.model.lm_head.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / BIN


def convert(path: Path) -> dict[str, torch.Tensor]:
    target = path.parent / WEIGHTS
    with target.open("wb") as file:
        convert_bin(path, file)
    return load_file(target)


def refuse(path: Path, *names: str) -> None:
    out = io.BytesIO()
    with pytest.raises(AdapterInvalidError) as caught:
        convert_bin(path, out)
    for name in (BIN, *names):
        assert name in caught.value.message
    assert out.getvalue() == b""


@pytest.mark.parametrize("zipped", [True, False])
def test_conversion_keeps_every_tensor_and_the_digest(path: Path, zipped: bool) -> None:
    tensors = random_tensors()
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    (path.parent / CONFIG).write_text('{"peft_type": "LORA"}')
    converted = convert(path)
    assert set(converted) == set(tensors)
    for name, tensor in tensors.items():
        assert converted[name].dtype == tensor.dtype
        assert converted[name].equal(tensor)
    digest = open_folder(path.parent, "a", "file:x").digest
    save_file({k: t.contiguous() for k, t in tensors.items()}, path.parent / WEIGHTS)
    assert open_folder(path.parent, "a", "file:x").digest == digest


def test_parameters_ordered_dictionaries_and_shared_storage_are_fine(path: Path) -> None:
    tensor = torch.randn(3, 4)
    parameter = torch.nn.Parameter(tensor)
    torch.save(OrderedDict(b=parameter, a=tensor[1], negative=torch._neg_view(tensor)), path)
    converted = convert(path)
    assert converted["a"].equal(tensor[1])
    assert converted["b"].equal(tensor)
    assert converted["negative"].equal(-tensor)


class Payload:
    """A pickle of this makes the file ``marker`` when it is loaded by a plain unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    path: Path, writer: str, inside: bool
) -> None:
    marker = path.parent / "marker"
    payload = Payload(marker)
    content = {KEY: torch.randn(2, 2), "extra": payload} if inside else payload
    if writer == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
        with pickle.loads(path.read_bytes()):
            pass
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
        loaded = torch.load(path, weights_only=False)
        (loaded["extra"] if inside else loaded).close()
    assert marker.exists(), "the payload must work, or this test shows nothing"
    marker.unlink()
    refuse(path, "cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ([torch.ones(2)], ("list", "dictionary")),
        (torch.ones(2), ("Tensor", "dictionary")),
        ({}, ("no tensors",)),
        ({KEY: 3}, (KEY, "int")),
        ({3: torch.ones(2)}, ("3",)),
        ({KEY: torch.ones(2, dtype=torch.int64)}, (KEY, "int64", "float32")),
        ({KEY: torch.ones(2, dtype=torch.complex64)}, (KEY, "complex64")),
        ({KEY: torch.ones(2, 2).to_sparse()}, (KEY, "sparse")),
        ({KEY: torch.ones(2, device="meta")}, (KEY, "meta")),
        ({KEY: torch.ones(1).expand(1_000_000)}, ("4000000",)),
    ],
)
def test_unwelcome_content(path: Path, content: Any, names: tuple[str, ...]) -> None:
    torch.save(content, path)
    refuse(path, *names)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file(path: Path, zipped: bool, share: float) -> None:
    tensors = {KEY: torch.randn(40, 40)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refuse(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"no pickle at all"])
def test_a_file_that_is_no_pickle(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refuse(path)


def test_a_git_lfs_pointer(path: Path) -> None:
    path.write_bytes(LFS_POINTER)
    refuse(path, "Git LFS pointer", "git lfs pull")


def rewrite(path: Path, compression: int, extra: bytes = b"") -> None:
    """Write the zip file again, with other compression and ``extra`` bytes after the pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data + extra if name.endswith("data.pkl") else data)


def test_a_compressed_file_cannot_be_a_bomb(path: Path) -> None:
    torch.save({KEY: torch.randn(4, 4)}, path)
    rewrite(path, zipfile.ZIP_DEFLATED, extra=bytes(50 * 2**20))
    assert path.stat().st_size < 2**17
    refuse(path, "compressed")


def test_a_directory_of_more_entries_than_a_file_can_need(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(1500):
            # Long names in the directory stand for many entries, and are quicker to write.
            archive.writestr(f"{index:05}" + "x" * 12_000, b"")
    refuse(path, "directory")


def test_a_name_that_safetensors_keeps_for_itself(path: Path) -> None:
    torch.save({"__metadata__": torch.randn(2), KEY: torch.randn(2)}, path)
    with (path.parent / WEIGHTS).open("wb") as file:
        convert_bin(path, file)
    (path.parent / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterInvalidError, match="__metadata__"):
        open_folder(path.parent, "a", "file:x")
