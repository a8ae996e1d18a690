"""The registry's tables as statements are written against; ``migrations`` creates them.

A revision is never changed once stored, except for what the latest check against a base found. A
name's current revision is always in its history, and a revision lives for as long as some name's
history holds it.
"""

from __future__ import annotations

import sqlalchemy as sa

DIGEST_LENGTH = 64
NAME_LENGTH = 128
SOURCE_LENGTH = 4096

metadata = sa.MetaData()

schema_versions = sa.Table(
    "schema_versions",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("applied_at", sa.Double, nullable=False),
)

revisions = sa.Table(
    "revisions",
    metadata,
    sa.Column("digest", sa.String(DIGEST_LENGTH), primary_key=True),
    sa.Column("base_fingerprint", sa.String(128), nullable=False),
    sa.Column("config_blob", sa.String(DIGEST_LENGTH), nullable=False, index=True),
    sa.Column("config_bytes", sa.BigInteger, nullable=False),
    sa.Column("weights_blob", sa.String(DIGEST_LENGTH), nullable=False, index=True),
    sa.Column("weights_bytes", sa.BigInteger, nullable=False),
    sa.Column("source", sa.String(SOURCE_LENGTH), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    # Last, because they are long and most queries do not read them.
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("receipt", sa.JSON(none_as_null=True)),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("name", sa.String(NAME_LENGTH), primary_key=True),
    sa.Column(
        "digest",
        sa.String(DIGEST_LENGTH),
        sa.ForeignKey("revisions.digest"),
        nullable=False,
        index=True,
    ),
    sa.Column("pinned", sa.Boolean, nullable=False),
    # Whence and when the name first got its current revision, as in the history.
    sa.Column("source", sa.String(SOURCE_LENGTH), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)

history = sa.Table(
    "history",
    metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("name", sa.String(NAME_LENGTH), sa.ForeignKey("adapters.name"), nullable=False),
    sa.Column(
        "digest",
        sa.String(DIGEST_LENGTH),
        sa.ForeignKey("revisions.digest"),
        nullable=False,
        index=True,
    ),
    sa.Column("source", sa.String(SOURCE_LENGTH), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Index("ix_history_name_digest", "name", "digest", "id"),
)
