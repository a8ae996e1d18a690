"""What identifies a base: the content of its checkpoint, sampled, whatever the machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
# Where a checkpoint came from and what wrote it, not what it computes.
_NOT_IDENTITY = frozenset({"_name_or_path", "transformers_version"})


def base_fingerprint(folder: Path) -> str:
    """Return 64 hex digits that two copies of a checkpoint share and two checkpoints do not.

    SHA-256 over ``config.json`` (without its origin) and, for each weight file, its size and
    ``_SAMPLES`` stretches of ``_SAMPLE_BYTES``, evenly spaced from its first byte to its last: 4
    MiB a file, whatever its size. Names, times and paths do not count.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in weights:
        size = path.stat().st_size
        digest.update(f"|{size}|".encode())
        last = max(0, size - _SAMPLE_BYTES)
        with path.open("rb") as file:
            for start in sorted({last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
