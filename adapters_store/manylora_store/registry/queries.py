"""What the registry answers. Every function is one look on the connection it is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from manylora_store.records import (
    NEVER_EXAMINED,
    AdapterRecord,
    BlobRef,
    RevisionFiles,
    RevisionRef,
)
from manylora_store.registry.names import can_be_a_name, comparable, unknown
from manylora_store.registry.schema import adapters, history, revisions

CHUNK = 500
"""Values bound in one statement; SQLite has a limit."""
_PAGE = (
    sa.select(
        adapters.c.name,
        adapters.c.digest,
        adapters.c.created_at,
        adapters.c.source,
        adapters.c.pinned,
        revisions.c.base_fingerprint,
        revisions.c.receipt,
        revisions.c.facts,
    )
    .join_from(adapters, revisions, adapters.c.digest == revisions.c.digest)
    .where(adapters.c.name > sa.bindparam("after"))
    .order_by(adapters.c.name)
    .limit(sa.bindparam("most", type_=sa.Integer))
)
_AMONG = _PAGE.where(adapters.c.name.in_(sa.bindparam("names", expanding=True)))
_HISTORY = (
    sa.select(history.c.name, history.c.digest, history.c.created_at, history.c.source)
    .where(
        history.c.id.in_(
            sa.select(sa.func.min(history.c.id))
            .where(history.c.name.in_(sa.bindparam("names", expanding=True)))
            .group_by(history.c.name, history.c.digest)
        )
    )
    .order_by(history.c.id.desc())
)
_FILES = sa.select(
    revisions.c.config_blob,
    revisions.c.config_bytes,
    revisions.c.weights_blob,
    revisions.c.weights_bytes,
).where(revisions.c.digest == sa.bindparam("digest"))
_ALIASES = (
    sa.select(adapters.c.digest, adapters.c.name)
    .where(adapters.c.digest.in_(sa.bindparam("digests", expanding=True)))
    .order_by(adapters.c.name)
)


def record(connection: sa.Connection, name: str) -> AdapterRecord:
    """Return the record of ``name``.

    Raises:
        UnknownAdapterError: no such name.
    """
    found = page(connection, limit=1, names=[name])
    if not found:
        raise unknown(name)
    return found[0]


def page(
    connection: sa.Connection,
    *,
    limit: int,
    after: str | None = None,
    names: Collection[str] | None = None,
) -> list[AdapterRecord]:
    """Return the first ``limit`` records, by name, of those after ``after`` and among ``names``."""
    bounds = {"after": comparable(after or ""), "most": limit}
    rows: list[Any] = []
    if names is None:
        rows += connection.execute(_PAGE, bounds).all()
    else:
        for chunk in _chunks(sorted(name for name in names if can_be_a_name(name))):
            bounds["most"] = limit - len(rows)
            rows += connection.execute(_AMONG, {"names": chunk, **bounds}).all()
            if len(rows) >= limit:
                break
    earlier = _earlier(connection, [row[0] for row in rows])
    aliases = _aliases(connection, {row[1] for row in rows})
    return [
        AdapterRecord(
            name=name,
            digest=digest,
            created_at=created_at,
            source=source,
            pinned=pinned,
            base_fingerprint=base_fingerprint,
            receipt=receipt,
            revisions=tuple(earlier[name]),
            aliases=tuple(aliases[digest]),
            **from_facts(facts),
        )
        for name, digest, created_at, source, pinned, base_fingerprint, receipt, facts in rows
    ]


def revision(connection: sa.Connection, digest: str) -> AdapterRecord | None:
    """Return what is known of the revision itself, under no name (``name`` is empty)."""
    row = connection.execute(sa.select(revisions).where(revisions.c.digest == digest)).first()
    if row is None:
        return None
    return AdapterRecord(
        name="",
        digest=row.digest,
        created_at=row.created_at,
        source=row.source,
        base_fingerprint=row.base_fingerprint,
        receipt=row.receipt,
        aliases=tuple(_aliases(connection, {digest})[digest]),
        **from_facts(row.facts),
    )


def files(connection: sa.Connection, digest: str) -> RevisionFiles | None:
    """Return which blobs hold the files of a revision; None where it is not stored."""
    row = connection.execute(_FILES, {"digest": digest}).first()
    return None if row is None else RevisionFiles(BlobRef(*row[:2]), BlobRef(*row[2:]))


def count(connection: sa.Connection) -> int:
    """Return how many names there are."""
    return connection.execute(sa.select(sa.func.count()).select_from(adapters)).scalar_one()


def names(
    connection: sa.Connection, base_fingerprint: str | None = None
) -> list[tuple[str, str, float]]:
    """Return ``(name, digest, created_at)`` of all names, or of those checked against one base."""
    statement = sa.select(adapters.c.name, adapters.c.digest, adapters.c.created_at)
    if base_fingerprint is not None:
        statement = statement.join(revisions, adapters.c.digest == revisions.c.digest).where(
            revisions.c.base_fingerprint == base_fingerprint
        )
    return [tuple(row) for row in connection.execute(statement.order_by(adapters.c.name))]


def pinned(connection: sa.Connection) -> list[tuple[str, str]]:
    """Return ``(name, digest)`` of the pinned names, sorted."""
    statement = sa.select(adapters.c.name, adapters.c.digest).where(adapters.c.pinned)
    return [tuple(row) for row in connection.execute(statement.order_by(adapters.c.name))]


def current_names(connection: sa.Connection, digest: str) -> list[str]:
    """Return the names that point at ``digest``, sorted."""
    return _aliases(connection, {digest})[digest]


def blobs_in_use(connection: sa.Connection, among: Collection[str] | None = None) -> set[str]:
    """Return the digests of the blobs that revisions refer to, all or those in ``among``."""
    used: set[str] = set()
    for column in (revisions.c.config_blob, revisions.c.weights_blob):
        if among is None:
            used.update(connection.execute(sa.select(column)).scalars())
        for chunk in _chunks(sorted(among or ())):
            used.update(connection.execute(sa.select(column).where(column.in_(chunk))).scalars())
    return used


def to_facts(record: AdapterRecord) -> dict[str, Any]:
    """Return what a check found out about a revision, as JSON-ready types."""
    return {
        "peft_type": record.peft_type,
        "rank": record.rank,
        "ranks": dict(record.ranks),
        "target_modules": list(record.target_modules),
        "parameters": record.parameters,
        "bytes": record.bytes,
        "base_model": record.base_model,
        "warnings": list(record.warnings),
        "unmixable": record.unmixable,
    }


def from_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return ``to_facts``'s result as the record's fields."""
    return {
        "unmixable": NEVER_EXAMINED,
        **facts,
        "target_modules": tuple(facts["target_modules"]),
        "warnings": tuple(facts["warnings"]),
    }


def _earlier(connection: sa.Connection, of: Sequence[str]) -> dict[str, list[RevisionRef]]:
    """Return each name's distinct revisions as the name first got them, newest first."""
    found = defaultdict(list)
    for chunk in _chunks(of):
        for name, *ref in connection.execute(_HISTORY, {"names": chunk}).all():
            found[name].append(RevisionRef(*ref))
    return found


def _aliases(connection: sa.Connection, digests: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that point at each of ``digests``, sorted."""
    found = defaultdict(list)
    for chunk in _chunks(sorted(digests)):
        for digest, name in connection.execute(_ALIASES, {"digests": chunk}).all():
            found[digest].append(name)
    return found


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
