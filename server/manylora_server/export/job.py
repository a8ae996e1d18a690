"""What an export is to who asks for it. Imports no torch."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from manylora_server.core.types import AdapterChoice
from manylora_server.export.progress import Progress
from manylora_store.export.methods import Recipe

ExportDtype = Literal["bf16", "fp16", "fp32", "nf4"]

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: frozenset[State] = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What a client asks for; ``adapters`` are references (``name`` or ``name@digest``)."""

    adapters: Mapping[str, float]
    output: str
    recipe: Recipe
    dtype: ExportDtype | None = None
    adapter_only: bool = False


@dataclass(slots=True)
class ExportJob:
    """One export from request to end. Its fields change under the service's lock only."""

    request: ExportRequest
    choices: Sequence[AdapterChoice]
    goal: Path
    progress: Progress = field(init=False)
    id: str = field(default_factory=lambda: f"exp-{uuid.uuid4().hex}")
    created_at: float = field(default_factory=time.time)
    state: State = "queued"
    share: float = 0.0
    seconds_left: float | None = None
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the export of DESIGN section 6, JSON-ready."""
        request = self.request
        left = self.seconds_left
        return {
            "id": self.id,
            "object": "export",
            "state": self.state,
            "progress": round(self.share, 4),
            "seconds_left": None if left is None else round(left, 1),
            "path": str(self.goal) if self.state == "done" else None,
            "report": self.report,
            "error": self.error,
            "adapters": dict(request.adapters),
            "method": request.recipe.method,
            "dtype": request.dtype,
            "output": request.output,
            "adapter_only": request.adapter_only,
            "created_at": int(self.created_at),
        }
