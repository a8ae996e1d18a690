"""``GET /v1/models``: the base, then every adapter as a model whose parent is the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request

from manylora_server.api.selection import resolve_model
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Json

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Json:
    """List every id that ``model`` may be."""
    engine = services_of(request).engine
    adapters = [
        _adapter(engine, _adapter_id(engine, name), digest, created_at)
        for name, digest, created_at in engine.adapters.served()
    ]
    return {"object": "list", "data": [_base(engine), *adapters]}


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Json:
    """Describe one model; every form that ``model`` takes in a request is understood."""
    engine = services_of(request).engine
    choice = resolve_model(engine, model_id)
    if choice is None:
        return _base(engine)
    record = engine.adapters.get(choice.name)
    created = engine.created if record is None else record.created_at
    return _adapter(engine, model_id, choice.digest, created)


def _adapter_id(engine: AsyncEngine, name: str) -> str:
    """Return the id by which ``model`` reaches the adapter, even under the base's own name."""
    return f"{engine.model_name}:{name}" if name == engine.model_name else name


def _base(engine: AsyncEngine) -> Json:
    return {
        "id": engine.model_name,
        "object": "model",
        "created": engine.created,
        "owned_by": "manylora",
        "root": engine.model_name,
        "parent": None,
        "max_model_len": engine.max_model_len,
    }


def _adapter(engine: AsyncEngine, model_id: str, digest: str, created: float) -> Json:
    return {
        **_base(engine),
        "id": model_id,
        "created": int(created),
        "parent": engine.model_name,
        "digest": digest,
    }
