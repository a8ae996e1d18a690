"""From received files to an opened adapter, and what its record then says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from manylora_store.checkpoint.folder import AdapterFiles, open_folder
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import (
    AdapterError,
    AdapterIncompatibleError,
    AdapterInvalidError,
    StoreFullError,
    TooLargeError,
)
from manylora_store.intake import files as intake_files
from manylora_store.intake.names import AdapterNameError
from manylora_store.intake.open import open_staged
from manylora_store.intake.staging import Staging
from unit.store.intake_support import (
    BASE,
    BIN,
    CONFIG,
    LFS_POINTER,
    WEIGHTS,
    adapter_files,
    tar_of,
    zip_of,
)
from unit.store.tiny_models import layout_of

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return adapter_files(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def digest(adapter: Mapping[str, bytes], tmp_path: Path) -> str:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name, data in adapter.items():
        (folder / name).write_bytes(data)
    return open_folder(folder, "a", "file:x").digest


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    with Staging(tmp_path / "staging", 2**20) as staging:
        yield staging


def receive(staging: Staging, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with staging.receive(name) as sink:
            for start in range(0, len(data), 999):
                sink.write(data[start : start + 999])


def as_bin(data: bytes) -> bytes:
    out = io.BytesIO()
    torch.save(load(data), out)
    return out.getvalue()


def opened(staging: Staging, files: Mapping[str, bytes]) -> AdapterFiles:
    """Receive and open ``files``; only the two of an adapter may be left."""
    receive(staging, files)
    result = open_staged(staging, "sql", "upload")
    assert sorted(os.listdir(staging.path)) == [CONFIG, WEIGHTS]
    assert (result.name, result.source, result.path) == ("sql", "upload", staging.path)
    return result


def refuse(
    staging: Staging, files: Mapping[str, bytes], error: type[Exception], *names: str
) -> None:
    receive(staging, files)
    with pytest.raises(error) as caught:
        compile_adapter(open_staged(staging, "sql", "upload"), layout_of(BASE))
    assert type(caught.value) is error
    for name in names:
        assert name in str(caught.value)


def test_every_way_in_gives_the_same_adapter(
    adapter: dict[str, bytes], digest: str, tmp_path: Path
) -> None:
    pickled = {CONFIG: adapter[CONFIG], BIN: as_bin(adapter[WEIGHTS])}
    ways = [
        adapter,
        pickled,
        {"archive": zip_of(adapter)},
        {"archive": tar_of({f"run/{name}": data for name, data in adapter.items()})},
        {"archive": tar_of(pickled)},
    ]
    for way in ways:
        with Staging(tmp_path / "staging", 2**20) as staging:
            files = opened(staging, way)
            assert files.digest == digest
            assert files.warnings == ()
            assert compile_adapter(files, layout_of(BASE)).record.parameters > 0
    assert os.listdir(tmp_path / "staging") == []


def test_what_is_left_aside_is_in_the_record(adapter: dict[str, bytes], staging: Staging) -> None:
    archive = tar_of(
        adapter | {BIN: b"never read", "README.md": b"", "x\ny": b""} | {f"f{i}": b"" for i in "ab"}
    )
    files = opened(staging, {"logs.txt": b"log", "archive": archive})
    warnings = compile_adapter(files, layout_of(BASE)).record.warnings
    assert warnings == files.warnings
    assert BIN in warnings[0]
    for name in ("'logs.txt'", "'README.md'", r"'x\ny'", "'fb'"):
        assert name in warnings[1]


def test_a_thousand_files_left_aside_are_one_short_warning(
    adapter: dict[str, bytes], staging: Staging
) -> None:
    others = {f"{index}" + "x" * 300: b"" for index in range(900)}
    (warning,) = opened(staging, {"archive": tar_of(adapter | others)}).warnings
    assert "and 890 more" in warning
    assert len(warning) < 2000


def test_an_archive_beside_files(adapter: dict[str, bytes], staging: Staging) -> None:
    refuse(staging, {"archive": zip_of(adapter), CONFIG: b"{}"}, AdapterInvalidError, "one archive")


def test_a_bad_name_is_refused_before_anything_is_opened(staging: Staging) -> None:
    receive(staging, {"archive": b"no archive"})
    with pytest.raises(AdapterNameError):
        open_staged(staging, "a/b", "upload")


def test_nothing_received(staging: Staging) -> None:
    refuse(staging, {}, AdapterInvalidError, CONFIG)


def test_the_limit_is_for_the_archive_and_again_for_its_contents(
    adapter: dict[str, bytes], tmp_path: Path
) -> None:
    archive = zip_of(adapter, 0)
    with Staging(tmp_path, len(archive)) as staging:
        opened(staging, {"archive": archive})
    total = sum(len(data) for data in adapter.values())
    with Staging(tmp_path, total - 1) as staging:
        refuse(staging, {"archive": zip_of(adapter)}, TooLargeError, str(total - 1))


def test_a_pickle_that_is_larger_once_converted(adapter: dict[str, bytes], tmp_path: Path) -> None:
    shared = torch.randn(40_000)
    out = io.BytesIO()
    torch.save({"a": shared, "b": shared, "c": shared}, out)
    received = {CONFIG: adapter[CONFIG], BIN: out.getvalue()}
    with Staging(tmp_path, 200_000) as staging:
        refuse(staging, received, TooLargeError, "200000")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, BIN])
@pytest.mark.parametrize("archived", [False, True])
def test_git_lfs_pointers(
    name: str, archived: bool, adapter: dict[str, bytes], staging: Staging
) -> None:
    files = {CONFIG: adapter[CONFIG], WEIGHTS: adapter[WEIGHTS]}
    if name == BIN:
        del files[WEIGHTS]
    files[name] = LFS_POINTER
    received = {"archive": zip_of(files)} if archived else files
    refuse(staging, received, AdapterInvalidError, name, "Git LFS pointer")


def test_a_disk_that_is_full_in_the_middle_of_unpacking(
    adapter: dict[str, bytes], staging: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(staging, {"archive": tar_of(adapter)})
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > len(adapter[CONFIG]):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(intake_files.os, "write", full)
    with pytest.raises(StoreFullError, match=WEIGHTS):
        open_staged(staging, "sql", "upload")


def config_with(adapter: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    raw = json.loads(adapter[CONFIG])
    for key, value in changes.items():
        raw.pop(key, None)
        if value is not ...:
            raw[key] = value
    return {**adapter, CONFIG: json.dumps(raw).encode()}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"peft_type": ...}, ("peft_type", "LORA")),
        ({"r": 10**9}, ("r is 1000000000", "65536")),
        ({"r": 10**400}, ("r is 1000", "65536")),
        ({"r": 65_536}, (f"{Q}.lora_A.weight", "rank 65536")),
        ({"r": 0}, ("r is 0",)),
        ({"r": -4}, ("r is -4",)),
        ({"rank_pattern": {"q_proj": 10**9}}, ("rank_pattern",)),
        ({"lora_alpha": 10**400}, ("lora_alpha",)),
        ({"lora_alpha": 1e400}, ("Infinity",)),
        ({"peft_type": "ADALORA", "init_r": 10**9}, ("init_r",)),
        ({"base_model_name_or_path": "a\0b"}, ("base_model_name_or_path",)),
        ({"base_model_name_or_path": "a" * 5000}, ("base_model_name_or_path",)),
        ({"base_model_name_or_path": "\ud800"}, ("not valid JSON",)),
    ],
)
def test_absurd_configurations(
    changes: dict[str, Any], names: tuple[str, ...], adapter: dict[str, bytes], staging: Staging
) -> None:
    refuse(staging, config_with(adapter, **changes), AdapterInvalidError, *names)


def test_a_number_too_long_to_be_read(adapter: dict[str, bytes], staging: Staging) -> None:
    text = b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}"
    refuse(staging, {**adapter, CONFIG: text}, AdapterInvalidError, CONFIG, "not valid JSON")


def rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.randn(2, 16)


def width(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"] = torch.randn(4, 32)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.randn(4, 16)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"][3, 1] = float("nan")


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_B.weight"] = torch.ones(16, 4, dtype=torch.int32)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        (rank, AdapterInvalidError, (f"{Q}.lora_A.weight", "rank 2", "rank 4")),
        (width, AdapterIncompatibleError, (f"{Q}.lora_A.weight", "[4, 32]", "[4, 16]")),
        (missing, AdapterInvalidError, (f"{Q}.lora_B.weight", "lacks")),
        (extra, AdapterIncompatibleError, ("layers.7", "does not have")),
        (not_a_number, AdapterInvalidError, (f"{Q}.lora_B.weight", "1 of 64")),
        (integers, AdapterInvalidError, (f"{Q}.lora_B.weight", "float32")),
    ],
)
def test_tensors_that_do_not_fit(
    change: Any,
    error: type[AdapterError],
    names: tuple[str, ...],
    pickled: bool,
    adapter: dict[str, bytes],
    staging: Staging,
) -> None:
    tensors = load(adapter[WEIGHTS])
    change(tensors)
    changed = save(tensors)
    received = {CONFIG: adapter[CONFIG]}
    received |= {BIN: as_bin(changed)} if pickled else {WEIGHTS: changed}
    refuse(staging, received, error, *names)


def test_finite_values_with_an_infinite_sum_are_accepted(
    adapter: dict[str, bytes], staging: Staging
) -> None:
    tensors = load(adapter[WEIGHTS])
    tensors[f"{Q}.lora_A.weight"].fill_(3e38)
    files = opened(staging, adapter | {WEIGHTS: save(tensors)})
    patch = compile_adapter(files, layout_of(BASE)).patches[Q.removeprefix("base_model.model.")]
    assert patch.low_rank is not None
    assert patch.low_rank.a.equal(torch.full((4, 16), 3e38))


PROGRAM = """
import sys
from pathlib import Path
from manylora_store.intake.open import open_staged
from manylora_store.intake.sources import fetch
from manylora_store.intake.staging import Staging
with Staging(Path(sys.argv[2]), 10**9) as staging:
    fetch(sys.argv[1], staging)
    print(open_staged(staging, "a", "file:x").digest)
print(sorted({"torch", "peft", "numpy", "huggingface_hub"} & set(sys.modules)))
"""


def test_intake_needs_torch_for_a_pickle_only(
    adapter: dict[str, bytes], digest: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / CONFIG).write_bytes(adapter[CONFIG])
    for name, data, imported in [
        (WEIGHTS, adapter[WEIGHTS], "[]"),
        (BIN, as_bin(adapter[WEIGHTS]), "['numpy', 'torch']"),
    ]:
        (folder / name).write_bytes(data)
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder, tmp_path / "staging"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.split("\n")[:2] == [digest, imported]
        (folder / name).unlink()
