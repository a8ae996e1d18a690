"""The schema behind ``GET /docs``, with the bodies that ``body.read_json`` reads."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from manylora_server.api.admin_schemas import ADMIN_MODELS
from manylora_server.api.query import QueryModel
from manylora_server.api.schemas import REQUEST_MODELS
from manylora_server.api.strict import StrictModel

_REFERENCE = "#/components/schemas/{model}"
_KEYS = {
    "key": {"type": "http", "scheme": "bearer", "description": "Where the server asks for keys."}
}
_TEXT = {"type": "string"}
_FILE = {"type": "string", "format": "binary"}


def json_body(model: type[StrictModel], *, required: bool = True) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route whose body is ``model``."""
    return {"requestBody": {"required": required, "content": _json_content(model)}}


def upload_body(model: type[StrictModel]) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route that takes files, or ``model`` in their place."""
    properties = {
        "name": {**_TEXT, "description": "The adapter's name."},
        "files": {
            "type": "array",
            "items": _FILE,
            "description": "adapter_config.json and adapter_model.safetensors.",
        },
        "archive": {**_FILE, "description": "Or both of them in a .zip or .tar.gz."},
    }
    form = {"type": "object", "required": ["name"], "properties": properties}
    content = {"multipart/form-data": {"schema": form}, **_json_content(model)}
    return {"requestBody": {"required": True, "content": content}}


def query_parameters(model: type[QueryModel]) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a route whose query is ``model``."""
    properties = model.model_json_schema()["properties"]
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in properties.items()
        ]
    }


def _json_content(model: type[StrictModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}


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
                [(model, "validation") for model in (*REQUEST_MODELS, *ADMIN_MODELS)],
                ref_template=_REFERENCE,
            )
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            components["securitySchemes"] = _KEYS
            schema["security"] = [{}, {"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    # FastAPI's documented way to replace the description.
    app.openapi = describe  # type: ignore[method-assign]
