"""``/admin/exports``: checkpoints made of the base and its adapters while requests are served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from manylora_server.api.admin_schemas import ExportBody, ExportListQuery, NoFields
from manylora_server.api.body import read_json, read_optional_json
from manylora_server.api.errors import error_event, internal_error
from manylora_server.api.openapi import json_body, query_parameters
from manylora_server.api.query import no_query, page, read_query
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Json
from manylora_server.api.sse import DONE, EventStreamResponse, data_event
from manylora_server.core.errors import ManyloraError
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.export.job import ENDED, ExportRequest
from manylora_store.export.methods import Recipe

if TYPE_CHECKING:
    from manylora_server.export.jobs import ExportService

router = APIRouter(tags=["admin"])

_NO_QUERY = [Depends(no_query)]
# How often a stream looks for news; progress itself changes about as often.
_LOOK_S = 0.1


@router.post(
    "/admin/exports",
    status_code=202,
    dependencies=_NO_QUERY,
    openapi_extra=json_body(ExportBody),
)
async def start_export(request: Request) -> Json:
    """Merge adapters into a copy of the base, in the background."""
    body = await read_json(request, ExportBody)
    with store_errors_translated(param="method"):
        recipe = Recipe(body.method, body.density, body.rank, body.seed)
    return await _service(request).start(
        ExportRequest(
            adapters=body.adapters,
            output=body.output,
            recipe=recipe,
            dtype=body.dtype,
            adapter_only=body.adapter_only,
        )
    )


@router.get("/admin/exports", openapi_extra=query_parameters(ExportListQuery))
async def list_exports(request: Request) -> Json:
    """List exports since the server's start, newest first."""
    query = read_query(request, ExportListQuery)
    data, has_more = _service(request).list(limit=query.limit, after=query.after)
    return page(data, "id", has_more=has_more)


@router.get("/admin/exports/{identity}", dependencies=_NO_QUERY)
async def get_export(request: Request, identity: str) -> Json:
    """Describe an export: how far it is, and what came of it."""
    return _service(request).get(identity)


@router.get("/admin/exports/{identity}/events", dependencies=_NO_QUERY)
async def follow_export(request: Request, identity: str) -> Response:
    """Send the export whenever it has changed, until it has ended; then ``[DONE]``."""
    service = _service(request)
    first = service.get(identity)
    return EventStreamResponse(_events(service, first), _nothing)


@router.delete("/admin/exports/{identity}", dependencies=_NO_QUERY)
async def cancel_export(request: Request, identity: str) -> Json:
    """Cancel an export; the answer comes once nothing of it is left. One that ended stays."""
    await read_optional_json(request, NoFields)
    return await _service(request).cancel(identity)


async def _events(service: ExportService, first: Json) -> AsyncIterator[bytes]:
    current = first
    try:
        yield data_event(current)
        while current["state"] not in ENDED:
            await asyncio.sleep(_LOOK_S)
            latest = service.get(current["id"])
            if latest != current:
                current = latest
                yield data_event(current)
    except ManyloraError as error:
        yield error_event(error)
    except Exception as error:  # noqa: BLE001 - internal_error logs it
        yield error_event(internal_error(error))
    yield DONE


async def _nothing() -> None:
    """A stream of events holds nothing."""


def _service(request: Request) -> ExportService:
    return services_of(request).engine.export_service
