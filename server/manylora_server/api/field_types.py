"""Fields that take several JSON shapes.

Each is a union whose branch is chosen by looking at the value, so that an error speaks of the
branch the client meant. Branch names in angle brackets stay out of error paths.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from manylora_server.api.strict import StrictModel, field_fault

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _prompt_branch(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return "<texts>"
    return "<lists of ids>" if isinstance(value[0], list) else "<ids>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[TokenIds], Tag("<lists of ids>")],
    Discriminator(
        _prompt_branch,
        custom_error_type="prompt",
        custom_error_message="should be a text, a list of token ids, or a list of either",
    ),
]


def _stop_branch(value: Any) -> str | None:
    if isinstance(value, str):
        return "<one>"
    return "<several>" if isinstance(value, list) else None


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[list[StopString], Field(max_length=16), Tag("<several>")],
    Discriminator(
        _stop_branch,
        custom_error_type="stop",
        custom_error_message="should be a string or a list of at most 16 strings",
    ),
]


class TextPart(StrictModel):
    """One part of a message; only text is served."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _type_first(cls, data: Any) -> Any:
        """Speak of the type of an image or the like, rather than of the fields it brings."""
        if isinstance(data, dict) and data.get("type", "text") != "text":
            raise field_fault("type", f"only 'text' parts are served, not {data['type']!r:.40}")
        return data


def _content_branch(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<parts>")],
    Discriminator(
        _content_branch,
        custom_error_type="content",
        custom_error_message='should be a string or a list of {"type": "text"} parts',
    ),
]


# Beyond this, a weight times an adapter's scaling may be no float32 any more.
LARGEST_WEIGHT = 1e6
AdapterName = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]


class WeightedAdapter(StrictModel):
    """One adapter of a mix."""

    name: AdapterName
    weight: Weight = 1.0


def _adapter_branch(value: Any) -> str | None:
    branches: dict[type, str] = {
        type(None): "<base>",
        str: "<name>",
        dict: "<weights>",
        list: "<list>",
    }
    return branches.get(type(value))


Adapter = Annotated[
    Annotated[None, Tag("<base>")]
    | Annotated[AdapterName, Tag("<name>")]
    | Annotated[dict[AdapterName, Weight], Field(min_length=1), Tag("<weights>")]
    | Annotated[list[WeightedAdapter], Field(min_length=1), Tag("<list>")],
    Discriminator(
        _adapter_branch,
        custom_error_type="adapter",
        custom_error_message=(
            'should be null (the base), "name", "name@DIGEST", an object of weights by name, '
            "or a list of objects with name and weight"
        ),
    ),
]
