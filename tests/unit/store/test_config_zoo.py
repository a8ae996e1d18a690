"""Configurations of every PEFT type: each becomes a value, or an error that says why not."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType

from manylora_store.checkpoint.config import SUPPORTED_PEFT_TYPES, AdapterConfig, read_config
from manylora_store.checkpoint.fields import FIELDS
from manylora_store.errors import AdapterError, AdapterUnsupportedError

COLLECTED = Path(__file__).parents[4] / "shared" / "data" / "adapter_configs"


def defaults_of(peft_type: PeftType) -> dict[str, Any]:
    """Return what PEFT writes for a configuration of this type in which nothing was chosen."""
    raw: dict[str, Any] = {}
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]):
        if field.default is not dataclasses.MISSING:
            raw[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            raw[field.name] = field.default_factory()
    return raw | {"peft_type": peft_type}


def plain(value: Any) -> Any:
    """Return what JSON has for a value it does not know."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value)


def read(path: Path) -> AdapterConfig | AdapterError:
    try:
        return read_config(path)
    except AdapterError as error:
        return error


def outcome(path: Path) -> AdapterConfig | AdapterError:
    """Read ``path``; a refusal must name the type, or else the field."""
    peft_type = json.loads(path.read_text()).get("peft_type")
    result = read(path)
    if isinstance(result, AdapterConfig):
        assert result.peft_type == peft_type
    elif peft_type in SUPPORTED_PEFT_TYPES:
        assert any(field in result.message for field in FIELDS), result.message
    else:
        assert repr(peft_type) in result.message
    return result


@pytest.mark.parametrize("peft_type", PEFT_TYPE_TO_CONFIG_MAPPING, ids=lambda kind: kind.value)
def test_the_defaults_of_every_type(peft_type: PeftType, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(defaults_of(peft_type), default=plain))
    result = outcome(path)
    if peft_type.value in SUPPORTED_PEFT_TYPES:
        assert isinstance(result, AdapterConfig)
    else:
        assert isinstance(result, AdapterUnsupportedError)


def test_every_collected_configuration() -> None:
    """The collection is not part of the repository; without it there is nothing to go through."""
    paths = sorted(COLLECTED.rglob("*.json")) if COLLECTED.is_dir() else []
    tally = Counter(type(outcome(path)).__name__ for path in paths)
    assert set(tally) <= {"AdapterConfig", "AdapterUnsupportedError"}
    assert sum(tally.values()) == len(paths)
