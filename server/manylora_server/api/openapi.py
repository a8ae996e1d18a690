"""The schema behind ``GET /docs``, with the bodies that ``body.read_json`` reads."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from manylora_server.api.schemas import REQUEST_MODELS
from manylora_server.api.strict import StrictModel

_REFERENCE = "#/components/schemas/{model}"


def json_body(model: type[StrictModel]) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route whose body is ``model``."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def install_openapi(app: FastAPI) -> None:
    """Let ``app`` describe itself with the schemas of the request bodies."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in REQUEST_MODELS], ref_template=_REFERENCE
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    # FastAPI's documented way to replace the description.
    app.openapi = describe  # type: ignore[method-assign]
