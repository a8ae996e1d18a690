"""The quantized form of a dense checkpoint, kept on disk so that only the first start is slow."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Raised whenever the same checkpoint would be quantized to something else than before.
RECIPE = 1


def cache_key(folder: Path, dtype: str) -> str:
    """Return a digest of the checkpoint's files (name, size, time) and of the recipe."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.suffix in {".safetensors", ".bin", ".json"}
    ]
    recipe = [RECIPE, dtype, version("bitsandbytes"), version("transformers")]
    return hashlib.sha256(json.dumps([files, recipe]).encode()).hexdigest()


def cached_folder(cache_dir: Path, key: str) -> Path | None:
    """Return the complete quantized checkpoint stored under ``key``, if there is one."""
    folder = cache_dir / key
    return folder if (folder / "config.json").is_file() else None


def store(cache_dir: Path, key: str, model: Any) -> None:
    """Store ``model`` (as transformers serialises 4-bit models) under ``key``, all or nothing.

    A full or read-only disk costs the cache, not the start: the failure is logged.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache_dir))
    except OSError as error:
        logger.warning("the quantized base cannot be cached in %s: %s", cache_dir, error)
        return
    try:
        model.save_pretrained(temporary)
        os.rename(temporary, cache_dir / key)
    except OSError as error:
        logger.warning("the quantized base cannot be cached in %s: %s", cache_dir, error)
        shutil.rmtree(temporary, ignore_errors=True)
