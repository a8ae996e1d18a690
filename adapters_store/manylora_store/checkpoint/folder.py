"""A PEFT adapter folder: found, checked and named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora_store.checkpoint.config import AdapterConfig, read_config
from manylora_store.checkpoint.weights import WeightFile, open_weights
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


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder whose configuration and weight file were read and found sound.

    ``digest`` is the SHA-256 of the content (see ``open_folder``), whatever the folder, the name or
    the weight file's format.
    """

    path: Path
    name: str
    source: str
    config: AdapterConfig
    weights: WeightFile
    digest: str


def open_folder(path: Path, name: str, source: str) -> AdapterFiles:
    """Open the PEFT adapter in folder ``path``, known as ``name`` and coming from ``source``.

    The digest is SHA-256 over the configuration as canonical JSON (keys sorted, the keys of
    ``NOT_IN_DIGEST`` left out, module sets sorted because PEFT writes them in random order), then
    name, dtype, shape and bytes of every tensor in the order of their names.

    Raises:
        AdapterInvalidError: missing, truncated or malformed files.
        AdapterUnsupportedError: a PEFT type or a field this server cannot compute.
    """
    if not path.is_dir():
        raise AdapterInvalidError(f"{path} is not a folder; an adapter is a folder of two files")
    config = read_config(path)
    weights = open_weights(path)
    digest = hashlib.sha256(_canonical_json(config.raw))
    weights.update_digest(digest)
    return AdapterFiles(
        path=path,
        name=name,
        source=source,
        config=config,
        weights=weights,
        digest=digest.hexdigest(),
    )


def _canonical_json(raw: Mapping[str, Any]) -> bytes:
    kept = {key: value for key, value in raw.items() if key not in NOT_IN_DIGEST}
    for key in _SETS:
        if isinstance(kept.get(key), list):
            kept[key] = sorted(set(kept[key]))
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
