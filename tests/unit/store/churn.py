"""Random changes to a few names, and what must hold meanwhile and afterwards."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from pathlib import Path

from manylora_store.errors import UnknownAdapterError, UnknownRevisionError
from manylora_store.registry import queries
from manylora_store.store import AdapterStore
from unit.store.small_adapters import blobs_in, digest_of, leftovers_in, publish

NAMES = ("hot", "hot", "hot", "other")
SEEDS = range(1, 5)


def seeds_by_digest(folder: Path) -> dict[str, int]:
    """Return which adapter each digest stands for."""
    return {digest_of(seed, folder / str(seed)): seed for seed in SEEDS}


def churn(store: AdapterStore, rounds: int, chance: random.Random, known: Mapping[str, int]) -> int:
    """Publish, roll back, remove, list, resolve and read at random; return how much was found.

    A name or revision may be gone that was there a moment ago; nothing else may fail, and what is
    found is what belongs there.
    """
    found = 0
    for _ in range(rounds):
        name = chance.choice(NAMES)
        try:
            found += _step(store, name, chance, known)
        except (UnknownAdapterError, UnknownRevisionError):
            continue
    return found


def _step(store: AdapterStore, name: str, chance: random.Random, known: Mapping[str, int]) -> bool:
    what = chance.choices(
        ["publish", "rollback", "remove", "get", "list", "read"], [4, 2, 1, 2, 1, 6]
    )[0]
    if what == "publish":
        seed = chance.choice(SEEDS)
        record = publish(store, name, seed, padding=chance.randrange(2)).record
        assert known[record.digest] == seed
        assert name in record.aliases
    elif what == "rollback":
        meant = chance.choice(sorted(known))
        assert store.rollback(name, meant[:10]).record.digest == meant
    elif what == "remove":
        assert store.remove(name) <= known.keys()
    elif what == "get":
        record = store.get(name)
        assert record.digest in {ref.digest for ref in record.revisions} <= known.keys()
        assert name in record.aliases
    elif what == "list":
        assert {record.name for record in store.list(limit=10)} <= set(NAMES)
    else:
        resolved = store.resolve(name)
        with store.files(resolved.digest) as files:
            content = files.weights.path.read_bytes()
        assert struct.unpack("<4f", content[-16:]) == (known[resolved.digest],) * 4
        return True
    return False


def check_integrity(store: AdapterStore, home: Path, known: Mapping[str, int]) -> None:
    """Hold what the registry says against itself, and against the files there are."""
    used: set[str] = set()
    for record in store.list(limit=100):
        assert record.digest in {ref.digest for ref in record.revisions}
        for ref in record.revisions:
            assert ref.digest in known
            with store.files(ref.digest) as files:
                used |= {files.config_path.resolve().name, files.weights.path.resolve().name}
    with store._database.read() as connection:
        assert queries.blobs_in_use(connection) == used
    assert blobs_in(home) == used
    assert leftovers_in(home) == []
