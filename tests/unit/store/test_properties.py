"""What must hold for any input: total parsing, a complete field table, no unnoticed damage."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig

from manylora_store.checkpoint.config import parse_config
from manylora_store.checkpoint.fields import FIELDS
from manylora_store.checkpoint.folder import open_folder
from manylora_store.checkpoint.names import parse_name
from manylora_store.errors import AdapterError, AdapterInvalidError
from unit.store.store_support import save_adapter
from unit.store.tiny_models import build_base

WEIGHTS = "adapter_model.safetensors"


def digest(folder: Path) -> str:
    return open_folder(folder, "name", "file:x").digest


def test_every_field_of_peft_is_decided() -> None:
    known = {f.name for config in (LoraConfig, AdaLoraConfig) for f in dataclasses.fields(config)}
    assert set(FIELDS) - known == {"merge_weights"}
    assert known - set(FIELDS) == set()


def test_opening_an_adapter_needs_neither_torch_nor_peft(source: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import manylora_store.checkpoint.names, manylora_store.records\n"
        "from manylora_store.checkpoint.folder import open_folder\n"
        "print(open_folder(Path(sys.argv[1]), 'name', 'file:x').digest)\n"
        "sys.exit(bool({'torch', 'peft', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, source], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest(source)


_scalars = st.sampled_from([None, True, False, 0, 1, -3, 8, 2.5, float("inf"), "", "q_proj", "all"])
_values = (
    _scalars
    | st.lists(_scalars, max_size=3)
    | st.dictionaries(st.sampled_from(["q_proj", "x.lora_E"]), _scalars | st.lists(_scalars))
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), _values, max_size=6))
def test_any_json_object_is_parsed_or_refused(raw: dict[str, Any]) -> None:
    for peft_type in ("LORA", "ADALORA"):
        try:
            config = parse_config({**raw, "peft_type": peft_type})
        except AdapterError as error:
            assert any(field in error.message for field in FIELDS)  # noqa: PT017
        else:
            assert config.rank > 0


@settings(deadline=None)
@given(st.text(max_size=20), st.sampled_from(["", ".lora_A.weight", ".base_layer.bias"]))
def test_any_tensor_name_is_understood_or_refused(middle: str, end: str) -> None:
    key = f"base_model.model.{middle}{end}"
    try:
        name = parse_name(key, {"lm_head"})
    except AdapterError as error:
        assert repr(key) in error.message  # noqa: PT017
    else:
        assert name.module == "lm_head"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    return save_adapter(build_base("llama"), config, tmp_path_factory.mktemp("adapter"))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_damage_to_the_weight_file_goes_unnoticed(source: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("adapter_config.json", WEIGHTS):
            (folder / file).write_bytes((source / file).read_bytes())
        original = digest(folder)
        content = bytearray((folder / WEIGHTS).read_bytes())
        # The header begins with free text, {"__metadata__":{"format":"pt"}, which nothing reads.
        free = range(content.index(b"format"), content.index(b"}"))
        place = data.draw(st.integers(0, len(content) - 1).filter(lambda at: at not in free))
        if data.draw(st.booleans()):
            content = content[:place]
        else:
            content[place] ^= data.draw(st.integers(1, 255))
        (folder / WEIGHTS).write_bytes(content)
        try:
            assert digest(folder) != original
        except AdapterInvalidError as error:
            assert WEIGHTS in error.message  # noqa: PT017
