"""Which revision ``name`` or ``name@digest`` means: the question that every request asks."""

from __future__ import annotations

import re

import sqlalchemy as sa

from manylora_store.errors import AmbiguousDigestError, UnknownRevisionError
from manylora_store.records import Resolved
from manylora_store.registry.names import can_be_a_name, unknown
from manylora_store.registry.schema import adapters, history, revisions

_PREFIX = re.compile(r"[0-9a-f]{8,64}")

_FROM = sa.bindparam("prefix", type_=sa.String)
_CURRENT = (
    sa.select(adapters.c.digest, revisions.c.base_fingerprint)
    .join_from(adapters, revisions, adapters.c.digest == revisions.c.digest)
    .where(adapters.c.name == sa.bindparam("name"))
)
# A name without a revision that fits gives one row of nulls, an unknown name none. "g" follows "f".
_EVER = (
    sa.select(adapters.c.digest, history.c.digest, revisions.c.base_fingerprint)
    .distinct()
    .join_from(
        adapters,
        history,
        (history.c.name == adapters.c.name)
        & (history.c.digest >= _FROM)
        & (history.c.digest < _FROM.concat("g")),
        isouter=True,
    )
    .join(revisions, revisions.c.digest == history.c.digest, isouter=True)
    .where(adapters.c.name == sa.bindparam("name"))
    .limit(2)
)


def resolve(connection: sa.Connection, name: str, prefix: str | None) -> Resolved:
    """Return what ``name`` means, or ``name@prefix``: one revision of the name's whole history.

    One statement, which SQLAlchemy compiles and the driver prepares once.

    Raises:
        UnknownAdapterError: no such name.
        UnknownRevisionError: nothing in the name's history starts with ``prefix``.
        AmbiguousDigestError: several revisions do.
    """
    if not can_be_a_name(name):
        raise unknown(name)
    if prefix is None:
        current = connection.execute(_CURRENT, {"name": name}).first()
        if current is None:
            raise unknown(name)
        return Resolved(name, current[0], current[1], current=True)
    if _PREFIX.fullmatch(prefix) is None:
        raise UnknownRevisionError(
            f"adapter {name!r}: {prefix[:80]!r} is no digest; 8 to 64 characters of 0-9 and a-f"
            " are expected"
        )
    found = connection.execute(_EVER, {"name": name, "prefix": prefix}).all()
    if not found:
        raise unknown(name)
    if len(found) > 1:
        raise AmbiguousDigestError(
            f"adapter {name!r} has several revisions whose digest starts with {prefix}; give more"
            " of its 64 digits"
        )
    current_digest, digest, fingerprint = found[0]
    if digest is None:
        raise UnknownRevisionError(
            f"adapter {name!r} never had a revision whose digest starts with {prefix}"
        )
    return Resolved(name, digest, fingerprint, current=digest == current_digest)
