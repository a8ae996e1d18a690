"""Server-sent events: a response that notices at once when its client goes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from manylora_server.api.generation import until_disconnect

DONE = b"data: [DONE]\n\n"


def data_event(content: dict[str, Any]) -> bytes:
    """Return ``content`` as one event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


class EventStreamResponse(Response):
    """Sends ``events`` as they come. ``close`` is awaited at the end, whatever the reason.

    Starlette's own streaming response leaves its iterator suspended when the client goes while
    it sends; here ``close`` frees what the events come from before the call returns.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # A stream has no length; the base class has set that of its empty body.
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, or as much of it as the client stays for."""
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            # The client's own wish; there is nobody left to tell.
            return
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
