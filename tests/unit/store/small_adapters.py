"""Adapters of a few hundred bytes, made without torch, and stores that hold them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from manylora_store.checkpoint.folder import AdapterFiles, open_folder
from manylora_store.records import AdapterRecord, Publication
from manylora_store.store import AdapterStore

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
BASE = "b" * 64


def write_adapter(folder: Path, seed: int, *, size: int = 2, padding: int = 0) -> Path:
    """Write a rank-1 adapter whose ``2 * size`` values follow from ``seed``.

    ``padding`` spaces at the end of the header are other bytes of a file with the same content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    span = 4 * size
    header = json.dumps(
        {
            KEY.format("A"): {"dtype": "F32", "shape": [1, size], "data_offsets": [0, span]},
            KEY.format("B"): {"dtype": "F32", "shape": [size, 1], "data_offsets": [span, 2 * span]},
        }
    ).encode()
    header += b" " * (-len(header) % 8 + 8 * padding)
    values = struct.pack("<f", seed) * (2 * size)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)
    return folder


def record_of(files: AdapterFiles, *, base_fingerprint: str = BASE) -> AdapterRecord:
    """Return a record as a check against a base would make it."""
    return AdapterRecord(
        name=files.name,
        digest=files.digest,
        peft_type="LORA",
        rank=1,
        ranks={"model.layers.0.self_attn.q_proj": 1},
        target_modules=("q_proj",),
        parameters=4,
        bytes=files.weights.size,
        base_model="org/base",
        created_at=1_700_000_000.5,
        source=files.source,
        warnings=("a warning",),
        base_fingerprint=base_fingerprint,
    )


@contextmanager
def staged(
    store: AdapterStore, seed: int, *, name: str = "a", source: str = "upload", padding: int = 0
) -> Iterator[AdapterFiles]:
    """Yield the adapter of ``seed`` as if it had just been uploaded."""
    with store.stage() as staging:
        write_adapter(staging.path, seed, padding=padding)
        yield open_folder(staging.path, name, source)


def publish(
    store: AdapterStore, name: str, seed: int, *, source: str = "upload", padding: int = 0
) -> Publication:
    """Publish the adapter of ``seed`` under ``name``."""
    with staged(store, seed, name=name, source=source, padding=padding) as files:
        return store.publish(name, files, replace(record_of(files), source=source))


def digest_of(seed: int, folder: Path) -> str:
    """Return the digest that the adapter of ``seed`` has, written to ``folder``."""
    return open_folder(write_adapter(folder, seed), "a", "upload").digest


def blobs_in(home: Path) -> set[str]:
    """Return the names of the files among the blobs of ``home``, each checked against its bytes."""
    found = [path for path in (home / "blobs").rglob("*") if path.is_file()]
    for path in found:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert path.stat().st_mode & 0o777 == 0o444
        assert path.parent.name == path.name[:2]
    return {path.name for path in found}


def leftovers_in(home: Path) -> list[str]:
    """Return what lies in the staging folder of ``home``."""
    return sorted(path.name for path in (home / "staging").iterdir())
