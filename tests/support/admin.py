"""Admin calls as an operator makes them, and what a server's home may hold."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from manylora_store.checkpoint.folder import open_folder

FILES = ("adapter_config.json", "adapter_model.safetensors")


def upload(http: httpx.Client, name: str, folder: Path) -> httpx.Response:
    """Upload a folder's two files."""
    files = [("files", (file, (folder / file).read_bytes())) for file in FILES]
    return http.post("/admin/adapters", data={"name": name}, files=files)


def complete(http: httpx.Client, adapter: Any, prompt: str, tokens: int, **more: Any) -> Any:
    """Return the greedy completion's response."""
    body = {
        "adapter": adapter,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }
    return http.post("/v1/completions", json=body)


def digest_of(folder: Path) -> str:
    """Return the digest that the store gives a folder's content."""
    return open_folder(folder, "any", "test").digest


def check_home(home: Path) -> dict[str, str]:
    """Assert that a stopped server's store is whole; return its names with their digests.

    Every blob holds what its name says and is somebody's; every revision has its blobs; nothing
    half-written is left.
    """
    blobs = {path.name: path for path in (home / "blobs" / "sha256").glob("*/*")}
    for digest, path in blobs.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, f"{path} is not itself"
        assert path.parent.name == digest[:2]
    staging = home / "staging"
    left = [path for path in staging.rglob("*") if path.suffix != ".lock"]
    assert left == [], f"left over: {left}"
    with closing(sqlite3.connect(home / "registry.sqlite3")) as connection:
        names = dict(connection.execute("SELECT name, digest FROM adapters"))
        revisions = {
            digest: (config, weights)
            for digest, config, weights in connection.execute(
                "SELECT digest, config_blob, weights_blob FROM revisions"
            )
        }
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert set(names.values()) <= set(revisions), "a name points nowhere"
    held = {blob for pair in revisions.values() for blob in pair}
    assert held == set(blobs), "revisions and blobs disagree"
    return names
