"""``adapter_config.json`` as a typed value. Imports neither torch nor peft."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from manylora_store.checkpoint.config_reader import CONFIG_NAME, BiasMode, FieldReader
from manylora_store.checkpoint.fields import refuse_unsupported_fields
from manylora_store.checkpoint.weights import refuse_lfs_pointer
from manylora_store.errors import AdapterInvalidError, AdapterUnsupportedError

MAX_CONFIG_BYTES = 16 * 2**20
SUPPORTED_PEFT_TYPES = ("LORA", "ADALORA")

PeftType = Literal["LORA", "ADALORA"]


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What a configuration says, with PEFT's defaults filled in.

    ``rank`` is ``r`` for LoRA and ``init_r`` for AdaLoRA. ``rank_pattern`` is LoRA's map from a
    module pattern to a rank, ``kept_ranks`` AdaLoRA's map from a module to the mask of the ranks
    that survived training. ``raw`` is the whole JSON object.
    """

    peft_type: PeftType
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    kept_ranks: Mapping[str, tuple[bool, ...]]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: BiasMode
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    base_model: str | None
    raw: Mapping[str, Any]


def read_config(path: Path) -> AdapterConfig:
    """Read and check the ``adapter_config.json`` at ``path``, whatever it is called there.

    Raises:
        AdapterInvalidError: missing, too large, a Git LFS pointer, not a JSON object, or with wrong
            types.
        AdapterUnsupportedError: a type or a field this server cannot compute.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_CONFIG_BYTES:
                raise AdapterInvalidError(
                    f"{CONFIG_NAME} has {size} bytes; at most {MAX_CONFIG_BYTES} are accepted"
                )
            text = file.read(size)
    except FileNotFoundError:
        raise AdapterInvalidError(f"{CONFIG_NAME} is missing; a PEFT adapter has one") from None
    except OSError as error:
        raise AdapterInvalidError(f"{CONFIG_NAME} cannot be read: {error.strerror}") from error
    refuse_lfs_pointer(CONFIG_NAME, text, size)
    try:
        raw = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
        # An escape can spell half a surrogate pair, which no database or response can hold.
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AdapterInvalidError(f"{CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterInvalidError(
            f"{CONFIG_NAME} holds a JSON {type(raw).__name__}; an object is expected"
        )
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> AdapterConfig:
    """Turn the JSON object of an ``adapter_config.json`` into an ``AdapterConfig``.

    Raises:
        AdapterInvalidError: ``peft_type`` is missing or a field has a wrong type or value.
        AdapterUnsupportedError: a type or a field this server cannot compute.
    """
    peft_type = _peft_type(raw)
    refuse_unsupported_fields(raw)
    reader = FieldReader(raw)
    adalora = peft_type == "ADALORA"
    config = AdapterConfig(
        peft_type=peft_type,
        rank=reader.rank("init_r", 12) if adalora else reader.rank("r", 8),
        alpha=reader.number("lora_alpha", 8),
        rank_pattern={} if adalora else reader.rank_pattern(),
        kept_ranks=reader.kept_ranks() if adalora else {},
        # PEFT's AdaLoRA layers read none of the next three, whatever the file says.
        alpha_pattern={} if adalora else reader.alpha_pattern(),
        use_rslora=reader.flag("use_rslora") and not adalora,
        lora_bias=reader.flag("lora_bias") and not adalora,
        use_dora=reader.flag("use_dora"),
        bias=reader.bias(),
        target_modules=reader.names_or_pattern("target_modules"),
        exclude_modules=reader.names_or_pattern("exclude_modules"),
        layers_to_transform=reader.layer_indices(),
        layers_pattern=reader.layers_pattern(),
        modules_to_save=reader.names("modules_to_save"),
        ensure_weight_tying=reader.flag("ensure_weight_tying"),
        base_model=reader.optional_text("base_model_name_or_path"),
        raw=dict(raw),
    )
    _check_combinations(config)
    return config


def _peft_type(raw: Mapping[str, Any]) -> PeftType:
    value = raw.get("peft_type")
    if value is None:
        raise AdapterInvalidError(
            f"{CONFIG_NAME} has no peft_type; PEFT writes one, for instance 'LORA'"
        )
    if not isinstance(value, str):
        raise AdapterInvalidError(f"{CONFIG_NAME}: peft_type is {value!r}; a string is expected")
    if value == "LORA":
        return "LORA"
    if value == "ADALORA":
        return "ADALORA"
    raise AdapterUnsupportedError(
        f"peft_type {value!r} is not supported; supported are {', '.join(SUPPORTED_PEFT_TYPES)}"
    )


def _check_combinations(config: AdapterConfig) -> None:
    if config.use_dora and config.peft_type == "ADALORA":
        raise AdapterInvalidError(f"{CONFIG_NAME}: use_dora cannot be combined with ADALORA")
    if config.use_dora and config.lora_bias:
        raise AdapterInvalidError(f"{CONFIG_NAME}: use_dora cannot be combined with lora_bias")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: layers_to_transform needs target_modules to be a list, not a pattern"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterInvalidError(f"{CONFIG_NAME}: layers_pattern needs layers_to_transform")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")
