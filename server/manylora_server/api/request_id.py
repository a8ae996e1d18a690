"""The id of the HTTP request being served, for whoever logs meanwhile."""

from __future__ import annotations

from contextvars import ContextVar

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
