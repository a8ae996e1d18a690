"""Calls to the admin API of a running server, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

Json = dict[str, Any]

# Reading answers at once; a change may wait for a download, a check or running requests.
_CONNECT_S = 10.0
_READ_S = 60.0
_PAGE = 500

_KEY_HINT = "give an admin key of the server by --admin-key or MANYLORA_ADMIN_KEY"
_HINTS = {
    "unauthorized": _KEY_HINT,
    "adapter_not_found": "'manylora adapters list' shows what there is",
    "overloaded": "try again later",
    "not_ready": "try again later",
}


class CallFailedError(Exception):
    """A call did not succeed; ``message`` is one line that says why and what would help."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdminClient:
    """One server at ``url``; a context manager. Every method raises ``CallFailedError``."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/")
        self._has_key = key is not None
        self._http = httpx.Client(
            base_url=self._url,
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
            # A proxy for the outside cannot reach what listens on this machine.
            trust_env=urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def pages(self, residency: str | None, limit: int | None) -> Iterator[Json]:
        """Yield pages of records, at most ``limit`` in all."""
        query: dict[str, str | int] = {} if residency is None else {"residency": residency}
        left = limit
        while left is None or left > 0:
            query["limit"] = _PAGE if left is None else min(left, _PAGE)
            page = self._answer(self._request("GET", "/admin/adapters", params=query))
            yield page
            if not page["has_more"]:
                return
            query["after"] = page["next"]
            left = None if left is None else left - len(page["data"])

    def get(self, name: str) -> Json:
        """Return an adapter's record."""
        return self._answer(self._request("GET", _path(name)))

    def remove(self, name: str, *, drain: bool) -> Json:
        """Remove an adapter, with ``drain`` once nothing uses it any more."""
        query = {"drain": "true"} if drain else {}
        request = self._patient_request("DELETE", _path(name), params=query)
        return self._answer(request, adapter_in_use="--drain waits until nothing uses it")

    def change(self, name: str, action: str, body: Mapping[str, Any] | None = None) -> Json:
        """Do what ``/admin/adapters/{name}/{action}`` does and return the adapter's record."""
        request = self._patient_request("POST", f"{_path(name)}/{action}", json=body)
        return self._answer(request)

    def add_source(self, name: str, source: str) -> Json:
        """Let the server fetch ``source`` and return the new adapter's record."""
        body = {"name": name, "source": source}
        return self._answer(self._patient_request("POST", "/admin/adapters", json=body))

    def add_mix(self, name: str, mix: Mapping[str, float]) -> Json:
        """Let the server sum up adapters it has and return the new adapter's record."""
        body = {"name": name, "mix": dict(mix)}
        return self._answer(self._patient_request("POST", "/admin/adapters", json=body))

    def upload(
        self, name: str, parts: list[tuple[str, Path]], progress: Callable[[int, int], None]
    ) -> Json:
        """Send files and return the new adapter's record.

        ``parts`` are form fields and what to read for them; ``progress`` is told the bytes sent
        and their total as they go. Files are read piece by piece.
        """
        with ExitStack() as stack:
            try:
                files = [
                    (field, (path.name, stack.enter_context(path.open("rb"))))
                    for field, path in parts
                ]
                request = self._patient_request(
                    "POST", "/admin/adapters", data={"name": name}, files=files
                )
                return self._answer(_watched(request, progress))
            except OSError as error:
                names = " and ".join(str(path) for _, path in parts)
                raise CallFailedError(f"{names}: cannot be read: {error.strerror}.") from error

    def _request(self, method: str, path: str, **arguments: Any) -> httpx.Request:
        return self._http.build_request(method, path, **arguments)

    def _patient_request(self, method: str, path: str, **arguments: Any) -> httpx.Request:
        timeout = httpx.Timeout(_READ_S, connect=_CONNECT_S, read=None)
        return self._request(method, path, timeout=timeout, **arguments)

    def _answer(self, request: httpx.Request, **hints: str) -> Json:
        """Send ``request``; ``hints`` say, by error code, what helps besides what always does."""
        try:
            response = self._http.send(request)
        except httpx.ConnectError as error:
            raise CallFailedError(
                f"cannot reach {self._url}: {error}; is the server running there? --url or "
                "MANYLORA_URL says where it is."
            ) from error
        except httpx.TimeoutException as error:
            raise CallFailedError(f"{self._url} does not answer; try again later.") from error
        except httpx.HTTPError as error:
            raise CallFailedError(f"the call to {self._url} broke off: {error}.") from error
        try:
            content = response.json()
            if response.is_success and isinstance(content, dict):
                return content
            refusal = content["error"]
            message, code = str(refusal["message"]), str(refusal["code"])
        except (ValueError, KeyError, TypeError) as failure:
            raise CallFailedError(
                f"{self._url} answered with status {response.status_code} and nothing that this "
                "command understands; is it a manylora server?"
            ) from failure
        hint = {**_HINTS, **hints}.get(code)
        if code == "forbidden" and self._has_key:
            hint = _KEY_HINT
        raise CallFailedError(message if hint is None else f"{message} ({hint})")


class _Watched(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, sent: Callable[[int], None]) -> None:
        self._stream = stream
        self._sent = sent

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            yield chunk
            self._sent(len(chunk))


def _watched(request: httpx.Request, progress: Callable[[int, int], None]) -> httpx.Request:
    """Return ``request`` with a body that reports how much of it was sent."""
    total, done = int(request.headers["content-length"]), 0

    def sent(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    assert isinstance(request.stream, httpx.SyncByteStream)
    return httpx.Request(
        request.method,
        request.url,
        headers=request.headers,
        stream=_Watched(request.stream, sent),
        extensions=request.extensions,
    )


def _path(name: str) -> str:
    return f"/admin/adapters/{quote(name, safe='')}"
