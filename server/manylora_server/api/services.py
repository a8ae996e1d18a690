"""What a route needs of the server, reachable from any request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from manylora_server.api.metrics import PrometheusMetrics
from manylora_server.core.config import HttpConfig

if TYPE_CHECKING:
    from manylora_server.adapters.service import AdapterService
    from manylora_server.engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Services:
    """Set once by ``create_app`` and never changed."""

    engine: AsyncEngine
    http: HttpConfig
    metrics: PrometheusMetrics
    adapter_service: AdapterService


def services_of(request: Request) -> Services:
    """Return the services of the application that serves ``request``."""
    services: Services = request.app.state.services
    return services
