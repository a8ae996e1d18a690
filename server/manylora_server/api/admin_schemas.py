"""The bodies and queries of admin calls."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from manylora_server.api.query import QueryModel
from manylora_server.api.strict import StrictModel, field_fault, only
from manylora_server.export.job import ExportDtype
from manylora_store.export.methods import Method
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


# So that the source of a mix, which names them all, is not longer than a registry takes.
MAX_MIXED = 16

AdapterName = Annotated[
    str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME.pattern}$"})
]
DigestPrefix = Annotated[
    str, AfterValidator(_check_digest), Field(json_schema_extra={"pattern": f"^{_DIGEST.pattern}$"})
]
Source = Annotated[str, Field(min_length=1, max_length=4096)]


Weights = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=200)], float], Field(min_length=1)
]


class AddAdapterRequest(StrictModel):
    """``POST /admin/adapters`` without files: the server fetches ``source`` itself.

    Or it sums up registered adapters: ``mix`` is their names (or ``name@digest``) with weights.
    """

    name: AdapterName
    source: Source | None = None
    mix: Annotated[Weights, Field(max_length=MAX_MIXED)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.source is None) == (self.mix is None):
            raise field_fault(
                "source" if self.mix is None else "mix",
                "give either source or mix",
            )
        return self


class LoadRequest(StrictModel):
    """``POST /admin/adapters/{name}/load``; ``pin`` left out leaves the pin as it is."""

    pin: bool | None = None


class RollbackRequest(StrictModel):
    """``POST /admin/adapters/{name}/rollback``: a revision of the name's history."""

    digest: DigestPrefix


class ExportBody(StrictModel):
    """``POST /admin/exports``: adapters by name (or ``name@digest``) with their weights."""

    adapters: Weights
    output: str
    method: Method = "cat"
    density: float | None = None
    dtype: ExportDtype | None = None
    rank: int | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    adapter_only: bool = False


class ExportListQuery(QueryModel):
    """``GET /admin/exports``: those older than the one called ``after``, at most ``limit``."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    after: Annotated[str, Field(max_length=100)] | None = None


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
    ExportBody,
    MergeRequest,
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)
