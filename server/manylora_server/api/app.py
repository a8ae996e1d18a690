"""Puts the HTTP application together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI

from manylora_server.api import (
    admin,
    chat,
    completions,
    exports,
    lora_compat,
    models,
    operations,
    tokenization,
)
from manylora_server.api.auth import require_admin, require_api_key
from manylora_server.api.errors import install_error_handlers
from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.api.middleware import RequestMiddleware
from manylora_server.api.openapi import install_openapi
from manylora_server.api.services import Services
from manylora_server.core.config import HttpConfig
from manylora_server.version import __version__

if TYPE_CHECKING:
    from manylora_server.adapters.service import AdapterService
    from manylora_server.engine.async_engine import AsyncEngine


def create_app(
    engine: AsyncEngine,
    http_config: HttpConfig,
    metrics: PrometheusMetrics,
    adapter_service: AdapterService,
) -> FastAPI:
    """Return the application over ``engine``, which the caller starts, drains and closes."""
    app = FastAPI(
        title="manylora",
        version=__version__,
        description="One quantized base model, many LoRA adapters, one batch.",
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = Services(engine, http_config, metrics, adapter_service)
    app.add_middleware(RequestMiddleware)
    install_error_handlers(app)
    install_openapi(app)
    app.include_router(operations.router)
    for module in (completions, chat, models, tokenization):
        app.include_router(module.router, dependencies=[Depends(require_api_key)])
    for module in (admin, exports, lora_compat):
        app.include_router(module.router, dependencies=[Depends(require_admin)])
    return app
