"""Who may call: bearer keys, compared in constant time and never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.requests import Request

from manylora_server.api.loopback import require_loopback
from manylora_server.api.services import services_of
from manylora_server.core.errors import ForbiddenError, UnauthorizedError


async def require_api_key(request: Request) -> None:
    """Refuse a call without one of the configured API keys; without any configured, let it pass.

    ``/health``, ``/ready``, ``/metrics``, ``/version`` and ``/docs`` do not ask for a key: probes
    and scrapers have none, and none of them shows a prompt, a completion or a key.
    """
    keys = services_of(request).http.api_keys
    if keys and not _is_among(_token(request, "KEY"), keys):
        raise UnauthorizedError("the key sent is not one of this server's keys.")


async def require_admin(request: Request) -> None:
    """Refuse a call without one of the admin keys; without any configured, one from elsewhere.

    A key that opens inference only is known but may not do this (403); any other is not (401).
    """
    http = services_of(request).http
    if not http.admin_keys:
        require_loopback(request)
        return
    token = _token(request, "ADMIN_KEY")
    # Both are looked through whatever the first says, as in ``_is_among``.
    is_admin, is_client = _is_among(token, http.admin_keys), _is_among(token, http.api_keys)
    if is_admin:
        return
    if is_client:
        raise ForbiddenError("the key sent opens inference; admin calls ask for an admin key.")
    raise UnauthorizedError("the key sent is not one of this server's admin keys.")


def _token(request: Request, placeholder: str) -> bytes:
    header = request.headers.get("authorization")
    if header is None:
        raise UnauthorizedError(
            f"this call asks for a key: send 'Authorization: Bearer {placeholder}'."
        )
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise UnauthorizedError(f"the authorization header must read 'Bearer {placeholder}'.")
    # Header text is latin-1 by the ASGI rules, whatever the client's encoding was.
    return token.strip().encode("latin-1")


def _is_among(token: bytes, keys: Iterable[str]) -> bool:
    given = _digest(token)
    # Every key is compared, so that the time taken says nothing about which one came close.
    matches = [hmac.compare_digest(given, _digest(key.encode())) for key in keys]
    return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
