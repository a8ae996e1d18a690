"""``/admin``: the adapters that this server keeps, and what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends
from starlette.requests import Request

from manylora_server.api.admin_schemas import (
    AddAdapterRequest,
    ListQuery,
    LoadRequest,
    MergeRequest,
    NoFields,
    RemoveQuery,
    RollbackRequest,
)
from manylora_server.api.body import media_type, read_json, read_optional_json
from manylora_server.api.generation import until_disconnect
from manylora_server.api.openapi import json_body, query_parameters, upload_body
from manylora_server.api.query import no_query, page, read_query
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Json
from manylora_server.api.uploads import MULTIPART, receive_upload
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.staged import staged

if TYPE_CHECKING:
    from manylora_server.adapters.service import AdapterService

router = APIRouter(tags=["admin"])

_NO_QUERY = [Depends(no_query)]


@router.post(
    "/admin/adapters",
    status_code=201,
    dependencies=_NO_QUERY,
    openapi_extra=upload_body(AddAdapterRequest),
)
async def add_adapter(request: Request) -> Json:
    """Check an adapter, keep it and let its name point at it; an older revision is kept, too.

    Once everything has come, this goes on even if the client does not wait for the answer.
    """
    service = _service(request)
    kind = media_type(request)
    if kind == MULTIPART:
        async with staged(service.stage) as staging:
            name = await receive_upload(request, staging)
            status = await service.add(name, staging, "upload")
    elif kind == "application/json":
        body = await read_json(request, AddAdapterRequest)
        if body.mix is not None:
            status = await service.add_mix(body.name, body.mix)
        else:
            assert body.source is not None
            status = await service.add_source(body.name, body.source)
    else:
        raise InvalidRequestError(
            f"content-type: {kind or 'none'} came; send files as {MULTIPART}, or a name and a "
            "source or mix as application/json."
        )
    return status.as_dict()


@router.get("/admin/adapters", openapi_extra=query_parameters(ListQuery))
async def list_adapters(request: Request) -> Json:
    """List adapters by name; ``next`` is the ``after`` of the page that follows."""
    query = read_query(request, ListQuery)
    found, has_more = await _service(request).list(
        limit=query.limit, after=query.after, residency=query.residency
    )
    return page([status.as_dict() for status in found], "name", has_more=has_more)


@router.get("/admin/adapters/{name}", dependencies=_NO_QUERY)
async def get_adapter(request: Request, name: str) -> Json:
    """Describe an adapter: its content, revisions, receipt and where it is now."""
    return (await _service(request).describe(name)).as_dict()


@router.delete("/admin/adapters/{name}", openapi_extra=query_parameters(RemoveQuery))
async def remove_adapter(request: Request, name: str) -> Json:
    """Forget a name with its history. While requests use it, that needs ``drain``, which waits.

    A client that goes while it waits takes its wish back.
    """
    query = read_query(request, RemoveQuery)
    await read_optional_json(request, NoFields)
    removing = _service(request).remove(name, drain=query.drain)
    if query.drain:
        await until_disconnect(request.receive, removing)
    else:
        await removing
    return {"id": name, "name": name, "object": "adapter", "deleted": True}


@router.post(
    "/admin/adapters/{name}/load",
    dependencies=_NO_QUERY,
    openapi_extra=json_body(LoadRequest, required=False),
)
async def load_adapter(request: Request, name: str) -> Json:
    """Bring an adapter to the device before the first request for it does."""
    body = await read_optional_json(request, LoadRequest)
    return (await _service(request).load(name, pin=body.pin)).as_dict()


@router.post("/admin/adapters/{name}/unload", dependencies=_NO_QUERY)
async def unload_adapter(request: Request, name: str) -> Json:
    """Free the memory an adapter takes; a request for it brings it back."""
    await read_optional_json(request, NoFields)
    return (await _service(request).unload(name)).as_dict()


@router.post("/admin/adapters/{name}/pin", dependencies=_NO_QUERY)
async def pin_adapter(request: Request, name: str) -> Json:
    """Keep an adapter from being evicted for others."""
    await read_optional_json(request, NoFields)
    return (await _service(request).set_pinned(name, True)).as_dict()


@router.post("/admin/adapters/{name}/unpin", dependencies=_NO_QUERY)
async def unpin_adapter(request: Request, name: str) -> Json:
    """Let an adapter be evicted for others again."""
    await read_optional_json(request, NoFields)
    return (await _service(request).set_pinned(name, False)).as_dict()


@router.post(
    "/admin/adapters/{name}/merge",
    dependencies=_NO_QUERY,
    openapi_extra=json_body(MergeRequest, required=False),
)
async def merge_adapter(request: Request, name: str) -> Json:
    """Fold an adapter into a copy of the base's weights, which steps of it alone then use.

    Answers once they may; requests go on meanwhile. It goes on without a client that waits.
    """
    body = await read_optional_json(request, MergeRequest)
    return (await _service(request).merge(name, body.precision, force=body.force)).as_dict()


@router.post("/admin/adapters/{name}/unmerge", dependencies=_NO_QUERY)
async def unmerge_adapter(request: Request, name: str) -> Json:
    """Drop an adapter's merged copy; the base was never touched, so nothing is to be undone."""
    await read_optional_json(request, NoFields)
    return (await _service(request).unmerge(name)).as_dict()


@router.post(
    "/admin/adapters/{name}/rollback",
    dependencies=_NO_QUERY,
    openapi_extra=json_body(RollbackRequest),
)
async def roll_back_adapter(request: Request, name: str) -> Json:
    """Let a name point at an earlier revision of its history."""
    body = await read_json(request, RollbackRequest)
    return (await _service(request).rollback(name, body.digest)).as_dict()


@router.get("/admin/stats", dependencies=_NO_QUERY)
async def stats(request: Request) -> Json:
    """Return what the server holds and has done, in numbers."""
    return await _service(request).stats()


def _service(request: Request) -> AdapterService:
    return services_of(request).adapter_service
