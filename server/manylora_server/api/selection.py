"""Which adapter a request means (DESIGN section 6): ``adapter`` first, else ``model``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora_server.api.field_types import WeightedAdapter
from manylora_server.api.schemas import GenerationRequest
from manylora_server.core.errors import (
    AdapterNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
)
from manylora_server.core.types import AdapterChoice

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Selection:
    """``model`` is the id to answer with; ``adapter`` is ``None`` for the base."""

    model: str
    adapter: AdapterChoice | None


def select(engine: AsyncEngine, body: GenerationRequest) -> Selection:
    """Resolve ``body``'s ``model`` and ``adapter``.

    ``model`` may be the base's id (which wins over an adapter of the same name), an adapter's
    name or ``base:adapter``; left out, it means the base. An ``adapter`` that is given, be it
    ``null``, decides; a ``model`` that names another adapter then contradicts it (400).
    """
    by_model = resolve_model(engine, body.model)
    model = body.model if body.model is not None else engine.model_name
    if "adapter" not in body.model_fields_set:
        return Selection(model, by_model)
    reference = _reference(body.adapter)
    chosen = None if reference is None else engine.adapters.resolve(reference)
    if by_model is not None and by_model != chosen:
        wanted = "null (the base)" if reference is None else repr(reference)
        raise InvalidRequestError(
            f"adapter: {wanted} contradicts model {body.model!r}; send the base's id "
            f"{engine.model_name!r} as model, or leave adapter out.",
            param="adapter",
        )
    return Selection(model, chosen)


def resolve_model(engine: AsyncEngine, model: str | None) -> AdapterChoice | None:
    """Return the adapter that ``model`` names, ``None`` for the base or no model at all.

    Raises ``ModelNotFoundError``.
    """
    base = engine.model_name
    if model is None or model == base:
        return None
    try:
        return engine.adapters.resolve(model.removeprefix(f"{base}:"))
    except (AdapterNotFoundError, InvalidRequestError) as error:
        raise ModelNotFoundError(
            f"model: {model!r} is neither the base {base!r} nor one of its adapters "
            f"({error.message.removesuffix('.')}). GET /v1/models lists them all.",
            param="model",
        ) from error


def _reference(
    adapter: str | dict[str, float] | list[WeightedAdapter] | None,
) -> str | None:
    """Return the one reference that ``adapter`` holds; ``None`` for the base."""
    if adapter is None or isinstance(adapter, str):
        return adapter
    if isinstance(adapter, dict):
        mix = list(adapter.items())
    else:
        mix = [(item.name, item.weight) for item in adapter]
    names = [name for name, _ in mix]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InvalidRequestError(
            f"adapter: {repeated!r} is listed more than once; give each adapter one weight.",
            param="adapter",
        )
    if len(mix) != 1 or mix[0][1] != 1.0:
        raise InvalidRequestError(
            "adapter: weighted mixes are not supported yet; name one adapter, with weight 1.",
            param="adapter",
        )
    return names[0]
