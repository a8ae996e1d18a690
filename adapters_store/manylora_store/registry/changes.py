"""What can be changed in the registry. Every function works inside one write transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from manylora_store.records import AdapterRecord, RevisionFiles
from manylora_store.registry import queries
from manylora_store.registry.names import can_be_a_name
from manylora_store.registry.resolution import resolve
from manylora_store.registry.schema import SOURCE_LENGTH, adapters, history, revisions


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Revisions that nothing refers to any more, and the blobs they may have been the last of."""

    digests: frozenset[str]
    blobs: frozenset[str]


def save_revision(connection: sa.Connection, record: AdapterRecord, files: RevisionFiles) -> None:
    """Store the revision ``record`` describes, or what the latest check of it found.

    A measured receipt stays where a later check against the same base brings none.
    """
    checked = {
        "base_fingerprint": record.base_fingerprint,
        "config_blob": files.config.digest,
        "config_bytes": files.config.size,
        "weights_blob": files.weights.digest,
        "weights_bytes": files.weights.size,
        "facts": queries.to_facts(record),
        "receipt": None if record.receipt is None else dict(record.receipt),
    }
    this = revisions.c.digest == record.digest
    stored = connection.execute(sa.select(revisions.c.base_fingerprint).where(this)).scalar()
    if stored is None:
        connection.execute(
            sa.insert(revisions).values(
                digest=record.digest,
                source=_text(record.source),
                created_at=record.created_at,
                **checked,
            )
        )
        return
    if record.receipt is None and stored == record.base_fingerprint:
        del checked["receipt"]
    connection.execute(sa.update(revisions).where(this).values(**checked))


def move_alias(
    connection: sa.Connection, name: str, digest: str, source: str, created_at: float
) -> str | None:
    """Let ``name`` point at the stored revision ``digest``; return what it pointed at, if another.

    Where the name had the revision before, ``source`` and ``created_at`` stay as they were then.

    Raises:
        ValueError: ``name`` is none that the registry can hold.
    """
    if not can_be_a_name(name):
        raise ValueError(f"{name!r} cannot be registered as a name")
    this = adapters.c.name == name
    previous: str | None = connection.execute(sa.select(adapters.c.digest).where(this)).scalar()
    if previous == digest:
        return None
    earlier = connection.execute(
        sa.select(history.c.source, history.c.created_at)
        .where(history.c.name == name, history.c.digest == digest)
        .order_by(history.c.id)
        .limit(1)
    ).first()
    now = time.time()
    whence = _text(source) if earlier is None else earlier.source
    alias = {
        "digest": digest,
        "source": whence,
        "created_at": created_at if earlier is None else earlier.created_at,
        "updated_at": now,
    }
    if previous is None:
        connection.execute(sa.insert(adapters).values(name=name, pinned=False, **alias))
    else:
        connection.execute(sa.update(adapters).where(this).values(**alias))
    connection.execute(
        sa.insert(history).values(
            name=name,
            digest=digest,
            source=whence,
            created_at=created_at if earlier is None else now,
        )
    )
    return previous


def set_pinned(connection: sa.Connection, name: str, pinned: bool) -> None:
    """Mark ``name`` as pinned or not.

    Raises:
        UnknownAdapterError: no such name.
    """
    resolve(connection, name, None)
    connection.execute(sa.update(adapters).where(adapters.c.name == name).values(pinned=pinned))


def forget(connection: sa.Connection, name: str) -> Forgotten:
    """Delete ``name``, its history, and the revisions that no other name's history holds.

    Raises:
        UnknownAdapterError: no such name.
    """
    resolve(connection, name, None)
    held = set(
        connection.execute(sa.select(history.c.digest).where(history.c.name == name)).scalars()
    )
    connection.execute(sa.delete(history).where(history.c.name == name))
    connection.execute(sa.delete(adapters).where(adapters.c.name == name))
    digests: set[str] = set()
    blobs: set[str] = set()
    for digest in held:
        elsewhere = sa.select(history.c.id).where(history.c.digest == digest).limit(1)
        if connection.execute(elsewhere).first() is not None:
            continue
        files = queries.files(connection, digest)
        if files is not None:
            blobs |= {files.config.digest, files.weights.digest}
        connection.execute(sa.delete(revisions).where(revisions.c.digest == digest))
        digests.add(digest)
    return Forgotten(frozenset(digests), frozenset(blobs))


def _text(source: str) -> str:
    """Return ``source`` as text every database takes: no NUL, no lone surrogates, bounded."""
    plain = source.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")
    return plain[:SOURCE_LENGTH]
