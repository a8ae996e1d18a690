"""``ExportService`` without a base: jobs in memory, which tests move on by hand."""

from __future__ import annotations

from typing import Any

from manylora_server.core.errors import ExportNotFoundError, ManyloraError
from manylora_server.export.job import ExportRequest


class FakeExportService:
    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[ExportRequest] = []
        self.refusal: ManyloraError | None = None
        # What a job becomes each time that it is looked at.
        self.script: list[dict[str, Any]] = []

    async def start(self, request: ExportRequest) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        identity = f"exp-{len(self.jobs)}"
        self.jobs[identity] = {"id": identity, "state": "queued", "progress": 0.0}
        return self.jobs[identity]

    def get(self, identity: str) -> dict[str, Any]:
        if identity not in self.jobs:
            raise ExportNotFoundError(f"id: no export {identity!r}.", param="id")
        current = dict(self.jobs[identity])
        if self.script:
            self.jobs[identity].update(self.script.pop(0))
        return current

    def list(self, *, limit: int, after: str | None) -> tuple[list[dict[str, Any]], bool]:
        names = list(reversed(self.jobs))
        if after is not None:
            self.get(after)
            names = names[names.index(after) + 1 :]
        return [self.jobs[name] for name in names[:limit]], len(names) > limit

    async def cancel(self, identity: str) -> dict[str, Any]:
        self.get(identity)
        self.jobs[identity]["state"] = "cancelled"
        return self.jobs[identity]
