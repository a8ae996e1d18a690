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
from manylora_server.core.types import AdapterChoice, AdapterMix

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine


Sent = str | dict[str, float] | list[WeightedAdapter] | None


@dataclass(frozen=True, slots=True)
class Selection:
    """``model`` is the id to answer with; ``adapter`` is ``None`` for the base."""

    model: str
    adapter: AdapterMix | None


def select(engine: AsyncEngine, body: GenerationRequest) -> Selection:
    """Resolve ``body``'s ``model`` and ``adapter``.

    ``model`` may be the base's id (which wins over an adapter of the same name), an adapter's
    name or ``base:adapter``; left out, it means the base. An ``adapter`` that is given, be it
    ``null``, decides; a ``model`` that names another adapter then contradicts it (400).
    """
    named = resolve_model(engine, body.model)
    by_model = None if named is None else AdapterMix.of(named)
    model = body.model if body.model is not None else engine.model_name
    if "adapter" not in body.model_fields_set:
        return Selection(model, by_model)
    chosen = _mix(engine, body.adapter)
    if by_model is not None and by_model != chosen:
        raise InvalidRequestError(
            f"adapter: {_described(chosen)} contradicts model {body.model!r}; send the base's id "
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


def _mix(engine: AsyncEngine, sent: Sent) -> AdapterMix | None:
    """Return the adapters that ``sent`` means, with their weights; ``None`` for the base."""
    if sent is None:
        return None
    if isinstance(sent, str):
        return AdapterMix.of(engine.adapters.resolve(sent))
    weights = _weights(sent)
    # Before the registry is asked for each of them.
    engine.limits.check_members(len(weights))
    mix = AdapterMix(
        tuple((engine.adapters.resolve(name), weight) for name, weight in weights.items())
    )
    engine.adapters.check_mixable(mix)
    return mix


def _weights(sent: dict[str, float] | list[WeightedAdapter]) -> dict[str, float]:
    """Return the weight of each reference, in the order that they came in."""
    if isinstance(sent, dict):
        return sent
    weights: dict[str, float] = {}
    for item in sent:
        if item.name in weights:
            raise InvalidRequestError(
                f"adapter: {item.name!r} is listed more than once; give each adapter one weight.",
                param="adapter",
            )
        weights[item.name] = item.weight
    return weights


def _described(mix: AdapterMix | None) -> str:
    if mix is None:
        return "null (the base)"
    if mix == AdapterMix.of(mix.members[0][0]):
        return repr(mix.members[0][0].name)
    return "the mix of " + ", ".join(
        f"{weight:g} {choice.name!r}" for choice, weight in mix.members
    )
