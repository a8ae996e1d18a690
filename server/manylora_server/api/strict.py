"""Request models that accept nothing they do not know, and say so in one sentence."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from manylora_server.core.errors import InvalidRequestError

ModelT = TypeVar("ModelT", bound="StrictModel")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60

_FIELD_FAULT = "field_fault"


class StrictModel(BaseModel):
    """Base of all request bodies: no unknown fields, no type coercion.

    A ``null`` counts as a field left out (as in OpenAI's API), but for those in ``keeps_null``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    keeps_null: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise PydanticCustomError(
                "object", "should be a JSON object, not {kind}", {"kind": json_kind(data)}
            )
        for name in data:
            if name not in cls.model_fields:
                hint = _hint(name, list(cls.model_fields))
                raise field_fault(name, f"unknown field{hint}")
        return {
            name: value
            for name, value in data.items()
            if value is not None or name in cls.keeps_null
        }


def field_fault(name: str, message: str) -> PydanticCustomError:
    """Return an error of a whole model that is about its field ``name``."""
    return PydanticCustomError(_FIELD_FAULT, "{message}", {"field": name, "message": message})


def only(*neutral: object) -> AfterValidator:
    """Accept a field that cannot be honoured only where its value asks for nothing."""

    def check(value: Any) -> Any:
        if any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            return value
        values = " or ".join(repr(allowed) for allowed in neutral)
        raise PydanticCustomError(
            "unsupported",
            "is not supported by this server; leave it out{otherwise}",
            {"otherwise": f" or send {values}" if neutral else ""},
        )

    return AfterValidator(check)


def validate(model: type[ModelT], data: object) -> ModelT:
    """Return ``data`` as ``model``; ``InvalidRequestError`` names the first field at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        path, message = _describe(details[0])
        more = f" ({len(details) - 1} more fields are at fault.)" if len(details) > 1 else ""
        raise InvalidRequestError(
            f"{path or 'the body'}: {message}.{more}", param=path or None
        ) from None


def json_kind(value: object) -> str:
    """Return JSON's name for the type of ``value``."""
    if value is None:
        return "null"
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a boolean"),
        (str, "a string"),
        ((int, float), "a number"),
        (list, "an array"),
    )
    return next((kind for types, kind in kinds if isinstance(value, types)), "an object")


def _describe(error: ErrorDetails) -> tuple[str, str]:
    """Return the field's path and what is wrong with it."""
    location: Sequence[int | str] = error["loc"]
    if error["type"] == _FIELD_FAULT:
        return _path([*location, error["ctx"]["field"]]), error["msg"]
    if error["type"] == "missing":
        return _path(location), "is required"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return _path(location), f"{message}; got {_repr.repr(error['input'])}"


def _path(location: Sequence[int | str]) -> str:
    """Write ``location`` as in ``messages[0].content``.

    Parts in angle or square brackets are names that unions and pydantic give their branches.
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(("<", "[")):
            path += f".{part}" if path else part
    return path


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; this call does not have it"
