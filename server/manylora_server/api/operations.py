"""What operators and their tools ask: health, readiness, metrics, version. All open."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from manylora_server.api.services import services_of
from manylora_server.api.shapes import Json
from manylora_server.core.errors import NotReadyError
from manylora_server.version import __version__

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Json:
    """Say whether the process lives; 503 means that only a restart helps."""
    if services_of(request).engine.dead:
        raise NotReadyError("the engine's thread has ended; restart the server.")
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Json:
    """Say whether requests are accepted now."""
    if not services_of(request).engine.ready:
        raise NotReadyError("the server is starting or shutting down; try again later.")
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format."""
    content = generate_latest(services_of(request).metrics.registry)
    return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/version")
async def version() -> Json:
    """Return the server's version."""
    return {"version": __version__}
