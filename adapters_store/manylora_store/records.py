"""What is known about one stored adapter revision. Imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One immutable adapter revision under the name it was registered with.

    ``digest`` is the SHA-256 (64 hex digits) of the adapter's content; two folders with the same
    configuration and tensors have the same digest whatever their names or file layout.
    ``ranks`` maps a target module's qualified name to its rank; ``rank`` is the largest of them
    (0 for an adapter without a low-rank part). ``bytes`` counts the adapter's weight file.
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
            "created_at": int(self.created_at),
            "source": self.source,
            "warnings": list(self.warnings),
        }
