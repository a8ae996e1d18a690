"""Around every request: its id, one access log line, and a 500 that leaks nothing."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manylora_server.api.errors import error_response, internal_error
from manylora_server.api.request_id import current_request_id

access_logger = logging.getLogger("manylora_server.access")

_SANE_ID = re.compile(r"[\x20-\x7e]{1,128}")


class RequestMiddleware:
    """Outermost middleware of the application.

    Every response carries ``x-request-id``: the client's own if it is 1 to 128 printable ASCII
    characters, otherwise a new one. The id is in ``current_request_id`` while the request runs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        token = current_request_id.set(request_id)
        started = time.monotonic()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if status is not None:
                # Half an answer is out; only breaking the connection can tell the client.
                raise
            await error_response(internal_error(error))(scope, receive, send_with_id)
        finally:
            access_logger.info(
                "%s %s %s %.1f ms",
                scope["method"],
                scope["path"],
                "-" if status is None else status,
                1000 * (time.monotonic() - started),
            )
            current_request_id.reset(token)


def _request_id(given: str | None) -> str:
    if given is not None and _SANE_ID.fullmatch(given) and given.strip():
        return given
    return f"req-{uuid.uuid4().hex}"
