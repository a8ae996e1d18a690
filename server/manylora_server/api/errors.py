"""The one mapping from the error tree to HTTP and to SSE (DESIGN section 6.1)."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from manylora_server.core.errors import ManyloraError

logger = logging.getLogger(__name__)

_INTERNAL = "the server failed to answer; its log has the reason under this x-request-id."
_ROUTING = {
    404: "no such path: {method} {path}; GET /docs lists the paths.",
    405: "{method} is not allowed for {path}; see the allow header.",
}


def error_body(error: ManyloraError) -> dict[str, Any]:
    """Return the JSON body that describes ``error``."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ManyloraError) -> JSONResponse:
    """Return the HTTP response for ``error``."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def error_event(error: ManyloraError) -> bytes:
    """Return the SSE event that ends a stream with ``error``."""
    return b"data: " + json.dumps(error_body(error), ensure_ascii=False).encode() + b"\n\n"


def internal_error(error: Exception) -> ManyloraError:
    """Log an unforeseen ``error`` with its traceback; return what the client may know of it."""
    logger.error("unforeseen %s", type(error).__name__, exc_info=error)
    return ManyloraError(_INTERNAL)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected failure of ``app`` in the contract's shape."""
    app.add_exception_handler(ManyloraError, _on_manylora_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_manylora_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ManyloraError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router itself refuses; the contract has no code of its own for these."""
    assert isinstance(error, HTTPException)
    template = _ROUTING.get(error.status_code, error.detail.replace("{", "{{").replace("}", "}}"))
    message = template.format(method=request.method, path=request.url.path)
    body = {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request",
        }
    }
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody reads this answer; its status is for the access log."""
    return Response(status_code=499)
