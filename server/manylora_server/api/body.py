"""A request's body: bounded, JSON, and validated against its schema."""

from __future__ import annotations

from typing import TypeVar

import pydantic_core
from starlette.requests import Request

from manylora_server.api.services import services_of
from manylora_server.api.strict import StrictModel, validate
from manylora_server.core.errors import InvalidRequestError, PayloadTooLargeError

ModelT = TypeVar("ModelT", bound=StrictModel)


async def read_json(request: Request, model: type[ModelT]) -> ModelT:
    """Return the request's body as ``model``.

    Raises ``PayloadTooLargeError`` once more bytes than the limit have come (or are announced),
    and ``InvalidRequestError`` for another content type, malformed JSON or a field at fault.
    """
    _require_json(request)
    return _parse(await _read(request), model)


async def read_optional_json(request: Request, model: type[ModelT]) -> ModelT:
    """Return the request's body as ``read_json`` does; no body at all counts as ``{}``."""
    data = await _read(request)
    if not data:
        return validate(model, {})
    _require_json(request)
    return _parse(data, model)


def media_type(request: Request) -> str:
    """Return the content type without its parameters; empty where none came."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _require_json(request: Request) -> None:
    if media_type(request) != "application/json":
        raise InvalidRequestError(
            f"content-type: {media_type(request) or 'none'} came; send the body as "
            "application/json.",
            param=None,
        )


def _parse(data: bytes, model: type[ModelT]) -> ModelT:
    try:
        content = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}.") from error
    return validate(model, content)


async def _read(request: Request) -> bytes:
    limit = services_of(request).http.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise _too_large(limit)
    return bytes(data)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than this server's limit of {limit} bytes.")
