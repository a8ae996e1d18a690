"""An adapter as operators see it: its record, where it is, and who uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from manylora_server.adapters.twins.record import TwinRecord
from manylora_store.records import AdapterRecord

Tier = Literal["disk", "host", "device"]
TIERS: tuple[Tier, ...] = ("disk", "host", "device")


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """``residency`` and ``twin`` are of the name's current revision; ``in_use`` counts accepted
    requests."""

    record: AdapterRecord
    residency: Tier
    in_use: int
    twin: TwinRecord | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the adapter record of DESIGN section 6, JSON-ready."""
        return {
            **self.record.as_dict(),
            "residency": self.residency,
            "merged": None if self.twin is None else self.twin.precision,
            "twin": None if self.twin is None else self.twin.as_dict(),
            "in_use": self.in_use,
        }
