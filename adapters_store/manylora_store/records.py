"""What is known about stored adapters, and what changes to them report. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NEVER_EXAMINED = "it was registered before mixes were known; add it again to have it examined"
"""What ``AdapterRecord.unmixable`` says of revisions that an earlier version stored."""


@dataclass(frozen=True, slots=True)
class RevisionRef:
    """One revision in a name's history: when the name first got it, and from where."""

    digest: str
    created_at: float
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-ready types."""
        return {
            "digest": self.digest,
            "created_at": int(self.created_at),
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One immutable adapter revision under the name it was registered with.

    ``digest`` is the SHA-256 (64 hex digits) of the adapter's content; two folders with the same
    configuration and tensors have the same digest whatever their names or file layout.
    ``ranks`` maps a target module's qualified name to its rank; ``rank`` is the largest of them
    (0 for an adapter without a low-rank part). ``bytes`` counts the adapter's weight file.

    ``base_fingerprint`` names the base the adapter was checked against (empty if none was) and
    ``receipt`` is its measured difference from PEFT, as JSON-ready types. ``revisions`` are the
    distinct revisions the name has pointed at, newest first and the current one among them;
    ``aliases`` all names that point at ``digest`` now, sorted. ``unmixable`` says why the adapter
    cannot be weighted or added to others; ``None`` if it can.
    """

    name: str
    digest: str
    peft_type: str
    rank: int
    ranks: Mapping[str, int]
    target_modules: tuple[str, ...]
    parameters: int
    bytes: int
    base_model: str | None
    created_at: float
    source: str
    warnings: tuple[str, ...] = field(default=())
    unmixable: str | None = None
    base_fingerprint: str = ""
    receipt: Mapping[str, Any] | None = None
    pinned: bool = False
    revisions: tuple[RevisionRef, ...] = ()
    aliases: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready types (DESIGN section 6, adapter record)."""
        return {
            "name": self.name,
            "digest": self.digest,
            "peft_type": self.peft_type,
            "rank": self.rank,
            "ranks": dict(self.ranks),
            "target_modules": list(self.target_modules),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "base_model": self.base_model,
            "base_fingerprint": self.base_fingerprint,
            "created_at": int(self.created_at),
            "source": self.source,
            "warnings": list(self.warnings),
            "unmixable": self.unmixable,
            "receipt": None if self.receipt is None else dict(self.receipt),
            "pinned": self.pinned,
            "aliases": list(self.aliases),
            "revisions": [revision.as_dict() for revision in self.revisions],
        }


@dataclass(frozen=True, slots=True)
class BlobRef:
    """One immutable file of the store: SHA-256 (64 hex digits) and number of its bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class RevisionFiles:
    """The blobs a revision consists of."""

    config: BlobRef
    weights: BlobRef

    def digests(self) -> set[str]:
        """Return the digests of the blobs."""
        return {self.config.digest, self.weights.digest}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The revision a request means; ``current`` says whether ``name`` points at it now."""

    name: str
    digest: str
    base_fingerprint: str
    current: bool


@dataclass(frozen=True, slots=True)
class Publication:
    """A name after a change: ``previous`` is the digest it pointed at before, if another.

    ``new_revision`` says whether the revision was unknown to the store before.
    """

    record: AdapterRecord
    new_revision: bool
    previous: str | None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """How many leftovers of processes that died were removed."""

    blobs: int
    staging_folders: int
