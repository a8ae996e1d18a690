"""A PEFT adapter folder: found, checked and named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora_store.checkpoint.config import AdapterConfig, read_config
from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.weights import (
    BIN_NAME,
    SAFETENSORS_NAME,
    WeightFile,
    open_weights,
)
from manylora_store.errors import AdapterInvalidError

NOT_IN_DIGEST = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "auto_mapping",
        "task_type",
    }
)
"""Configuration keys that say where an adapter came from, not what it computes."""

_SETS = ("target_modules", "exclude_modules")
_FIRST_MATCH_WINS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter whose configuration and weight file were read and found sound.

    ``digest`` is the SHA-256 of the content (see ``open_folder``), wherever the files are, whatever
    they are called, and whatever the weight file's format was. ``warnings`` are for the record.
    """

    name: str
    source: str
    config_path: Path
    config: AdapterConfig
    weights: WeightFile
    digest: str
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The folder of the configuration; of an opened folder, what PEFT would load."""
        return self.config_path.parent


def open_folder(
    path: Path, name: str, source: str, *, warnings: tuple[str, ...] = ()
) -> AdapterFiles:
    """Open the PEFT adapter in folder ``path``, known as ``name`` and coming from ``source``.

    The digest is SHA-256 over the configuration as canonical JSON (keys sorted, the keys of
    ``NOT_IN_DIGEST`` left out, module sets sorted because PEFT writes them in random order), then
    name, dtype, shape and bytes of every tensor in the order of their names. PEFT sorts patterns
    too when it saves, but takes the first that matches; patterns in any other order are therefore
    part of the content, as lists of pairs.

    Raises:
        AdapterInvalidError: missing, truncated or malformed files.
        AdapterUnsupportedError: a PEFT type or a field this server cannot compute.
    """
    if not path.is_dir():
        raise AdapterInvalidError(f"{path} is not a folder; an adapter is a folder of two files")
    config_path = path / CONFIG_NAME
    config = read_config(config_path)
    weights = open_weights(_weight_path(path))
    digest = hashlib.sha256(_canonical_json(config.raw))
    weights.update_digest(digest)
    return AdapterFiles(
        name=name,
        source=source,
        config_path=config_path,
        config=config,
        weights=weights,
        digest=digest.hexdigest(),
        warnings=warnings,
    )


def open_stored(
    config_path: Path, weights_path: Path, *, name: str, source: str, digest: str
) -> AdapterFiles:
    """Open the two files of an adapter that was opened before, and had ``digest`` then.

    Configuration and header are read and checked again, the digest is taken as given.

    Raises:
        AdapterInvalidError: missing, truncated or malformed files.
        AdapterUnsupportedError: a PEFT type or a field this server cannot compute.
    """
    return AdapterFiles(
        name=name,
        source=source,
        config_path=config_path,
        config=read_config(config_path),
        weights=open_weights(weights_path),
        digest=digest,
    )


def _weight_path(folder: Path) -> Path:
    path = folder / SAFETENSORS_NAME
    if path.is_file():
        return path
    if (folder / BIN_NAME).is_file():
        raise AdapterInvalidError(
            f"{BIN_NAME} is a pickle; {SAFETENSORS_NAME} is expected, which the store converts it"
            " to when it takes an adapter in"
        )
    raise AdapterInvalidError(
        f"no weights: neither {SAFETENSORS_NAME} nor {BIN_NAME} is in the folder"
    )


def _canonical_json(raw: Mapping[str, Any]) -> bytes:
    kept = {key: value for key, value in raw.items() if key not in NOT_IN_DIGEST}
    for key in _SETS:
        if isinstance(kept.get(key), list):
            kept[key] = sorted(set(kept[key]))
    for key in _FIRST_MATCH_WINS:
        if isinstance(kept.get(key), dict) and list(kept[key]) != sorted(kept[key]):
            kept[key] = list(kept[key].items())
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
