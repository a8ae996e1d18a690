"""Admin calls without a key: from this machine only, and from no web page but its own."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from manylora_server.core.errors import ForbiddenError

_HOW_TO = "; start the server with --admin-key-file to accept admin calls with a key from anywhere."
_FORWARDING = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def require_loopback(request: Request) -> None:
    """Refuse a call that does not come straight from a program on this machine.

    A browser on it runs anybody's pages, and those can send requests here: under their own
    ``Origin``, or, once their name has been made to resolve to this machine, under their own
    ``Host``. A proxy on it passes on anybody's calls, whatever address those claim.
    Raises ``ForbiddenError``.
    """
    client = request.client
    if client is None or not is_loopback(client.host):
        origin = "an unknown address" if client is None else client.host
        raise ForbiddenError(
            f"admin calls are accepted from this machine's loopback address only, not from "
            f"{origin}{_HOW_TO}"
        )
    headers = request.headers
    forwarded = next((name for name in _FORWARDING if name in headers), None)
    if forwarded is not None:
        raise ForbiddenError(
            f"{forwarded}: admin calls through a proxy are not accepted without a key{_HOW_TO}"
        )
    for host in headers.getlist("host"):
        if not _names_loopback(f"//{host}"):
            raise ForbiddenError(
                f"host: {host!r:.100} is not a name of the loopback address; call 127.0.0.1 or "
                f"localhost{_HOW_TO}"
            )
    for origin in headers.getlist("origin"):
        if not _names_loopback(origin):
            raise ForbiddenError(
                f"origin: admin calls from web pages of {origin!r:.100} are not accepted without "
                f"a key{_HOW_TO}"
            )


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address, or a name reserved for it (RFC 6761)."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _names_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    return host is not None and is_loopback(host)
