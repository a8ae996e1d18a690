"""Who may call: bearer keys, compared in constant time and never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request

from manylora_server.api.services import services_of
from manylora_server.core.errors import UnauthorizedError


async def require_api_key(request: Request) -> None:
    """Refuse a call without one of the configured API keys; without any configured, let it pass.

    ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/docs`` do not ask for a key: probes
    and scrapers have none, and none of them shows a prompt, a completion or a key.
    """
    keys = services_of(request).http.api_keys
    if keys:
        _check(request.headers.get("authorization"), keys)


def _check(header: str | None, keys: Iterable[str]) -> None:
    if header is None:
        raise UnauthorizedError("this server asks for a key: send 'Authorization: Bearer KEY'.")
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthorizedError("the authorization header must read 'Bearer KEY'.")
    # Header text is latin-1 by the ASGI rules, whatever the client's encoding was.
    given = _digest(token.strip().encode("latin-1"))
    # Every key is compared, so that the time taken says nothing about which one came close.
    matches = [hmac.compare_digest(given, _digest(key.encode())) for key in keys]
    if not any(matches):
        raise UnauthorizedError("the key sent is not one of this server's keys.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
