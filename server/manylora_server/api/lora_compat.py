"""vLLM's calls to load and unload adapters, for tools that were written for it."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from manylora_server.api.admin_schemas import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from manylora_server.api.body import read_json
from manylora_server.api.generation import until_disconnect
from manylora_server.api.openapi import json_body
from manylora_server.api.services import services_of
from manylora_server.core.errors import AdapterNotFoundError, InvalidRequestError

if TYPE_CHECKING:
    from manylora_server.adapters.service import AdapterService

router = APIRouter(tags=["admin"])

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[^\s@]+)?")


@router.post("/v1/load_lora_adapter", openapi_extra=json_body(LoadLoRAAdapterRequest))
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Add the adapter in a folder of the server's machine, or on the hub.

    A name that is taken needs ``load_inplace``, unless it was loaded from the same place.
    """
    service = services_of(request).adapter_service
    body = await read_json(request, LoadLoRAAdapterRequest)
    source = await asyncio.to_thread(_source, body.lora_path)
    if not body.load_inplace:
        await _check_free(service, body.lora_name, source)
    await service.add_source(body.lora_name, source)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=json_body(UnloadLoRAAdapterRequest))
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Remove an adapter, once the requests that use it have ended."""
    body = await read_json(request, UnloadLoRAAdapterRequest)
    removing = services_of(request).adapter_service.remove(body.lora_name, drain=True)
    await until_disconnect(request.receive, removing)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _source(path: str) -> str:
    """Return the source that vLLM would take ``path`` for: a folder first, then a hub id."""
    if path.startswith(("file:", "hf:")):
        return path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return f"file:{os.path.abspath(folder)}"
    if _HUB_ID.fullmatch(path) and not path.startswith("."):
        return f"hf:{path}"
    raise InvalidRequestError(
        f"lora_path: {path!r} is neither a folder on the server's machine nor the id of a "
        "repository on the hub (ORGANISATION/NAME).",
        param="lora_path",
    )


async def _check_free(service: AdapterService, name: str, source: str) -> None:
    try:
        present = await service.describe(name)
    except AdapterNotFoundError:
        return
    known: str = present.as_dict()["source"]
    # A repository's source is recorded with the revision that was fetched.
    if known == source or (known.startswith("hf:") and known.startswith(f"{source}@")):
        return
    raise InvalidRequestError(
        f"lora_name: The lora adapter '{name}' has already been loaded, from {known}; send "
        "load_inplace true to replace it.",
        param="lora_name",
    )
