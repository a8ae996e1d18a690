"""A request's query, validated as strictly as a body but for types: a query holds text only; and
the pages that queries ask for."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ConfigDict
from starlette.requests import Request

from manylora_server.api.strict import StrictModel, validate
from manylora_server.core.errors import InvalidRequestError

QueryT = TypeVar("QueryT", bound="QueryModel")


class QueryModel(StrictModel):
    """Base of all queries: no unknown parameters; numbers and booleans are read from text."""

    model_config = ConfigDict(strict=False)


class NoQuery(QueryModel):
    """The query of a call that has none."""


def read_query(request: Request, model: type[QueryT]) -> QueryT:
    """Return the request's query as ``model``.

    Raises ``InvalidRequestError`` naming a parameter that is unknown, repeated or malformed.
    """
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise InvalidRequestError(f"{name}: is given more than once.", param=name)
        given[name] = value
    return validate(model, given)


async def no_query(request: Request) -> None:
    """Refuse any parameter; the dependency of routes that have none."""
    read_query(request, NoQuery)


def page(data: list[dict[str, Any]], key: str, *, has_more: bool) -> dict[str, Any]:
    """Return one page of a list; ``next`` is the ``after`` of the page that follows, by ``key``."""
    following = data[-1][key] if has_more else None
    return {"object": "list", "data": data, "has_more": has_more, "next": following}
