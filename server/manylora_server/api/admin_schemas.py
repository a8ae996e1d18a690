"""The bodies and queries of admin calls."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from manylora_server.api.query import QueryModel
from manylora_server.api.strict import StrictModel, only
from manylora_store.intake.names import NAME

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


def _check_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise PydanticCustomError(
            "adapter_name",
            "is not an adapter name; use 1 to 128 letters, digits, '.', '_' or '-', the first a "
            "letter or digit",
        )
    return name


def _check_digest(digest: str) -> str:
    if _DIGEST.fullmatch(digest) is None:
        raise PydanticCustomError(
            "digest", "is not a digest; give 8 to 64 of its lower-case hex digits"
        )
    return digest


AdapterName = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})
]
DigestPrefix = Annotated[
    str, AfterValidator(_check_digest), Field(json_schema_extra={"pattern": f"^{_DIGEST.pattern}$"})
]
Source = Annotated[str, Field(min_length=1, max_length=4096)]


class AddAdapterRequest(StrictModel):
    """``POST /admin/adapters`` without files: the server fetches ``source`` itself."""

    name: AdapterName
    source: Source


class LoadRequest(StrictModel):
    """``POST /admin/adapters/{name}/load``; ``pin`` left out leaves the pin as it is."""

    pin: bool | None = None


class RollbackRequest(StrictModel):
    """``POST /admin/adapters/{name}/rollback``: a revision of the name's history."""

    digest: DigestPrefix


class MergeRequest(StrictModel):
    """``POST /admin/adapters/{name}/merge``; ``force`` takes an nf4 twin whatever it lost."""

    precision: Literal["bf16", "int8", "nf4"] = "bf16"
    force: bool = False


class NoFields(StrictModel):
    """The body of a call that needs none."""


class ListQuery(QueryModel):
    """``GET /admin/adapters``: the names after ``after``, at most ``limit``, in one residency."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    after: Annotated[str, Field(max_length=1024)] | None = None
    residency: Literal["disk", "host", "device"] | None = None


class RemoveQuery(QueryModel):
    """``DELETE /admin/adapters/{name}``: with ``drain``, wait for what still runs."""

    drain: bool = False


class LoadLoRAAdapterRequest(StrictModel):
    """vLLM's ``POST /v1/load_lora_adapter``."""

    lora_name: AdapterName
    lora_path: Source
    load_inplace: bool = False
    is_3d_lora_weight: Annotated[Any, only(False)] = False


class UnloadLoRAAdapterRequest(StrictModel):
    """vLLM's ``POST /v1/unload_lora_adapter``; ``lora_int_id`` changes nothing here."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


ADMIN_MODELS: tuple[type[StrictModel], ...] = (
    AddAdapterRequest,
    LoadRequest,
    RollbackRequest,
    MergeRequest,
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)
