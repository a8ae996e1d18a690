"""Typed access to the fields of a raw configuration. Imports neither torch nor peft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeGuard

from manylora_store.errors import AdapterInvalidError

CONFIG_NAME = "adapter_config.json"

BiasMode = Literal["none", "all", "lora_only"]

MAX_RANK = 65_536
"""More than any layer is wide; what is computed from a rank stays within float64 and memory."""

MAX_TEXT = 4096
_SHOWN = 200
_MAX_NUMBER = 2**1023


def _is_number(value: Any) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # JSON integers have no bound; one beyond float64 cannot even be asked whether it is finite.
    return abs(value) <= _MAX_NUMBER and math.isfinite(value)


def _is_rank(value: Any) -> TypeGuard[int]:
    return _is_integer(value) and 1 <= value <= MAX_RANK


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


class FieldReader:
    """Reads fields by type: ``null`` is absent, a wrong type is an ``AdapterInvalidError``."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def _fail(self, key: str, expected: str) -> NoReturn:
        found = repr(self._raw[key])
        if len(found) > _SHOWN:
            found = found[:_SHOWN] + "…"
        raise AdapterInvalidError(f"{CONFIG_NAME}: {key} is {found}; {expected} is expected")

    def flag(self, key: str) -> bool:
        """Read a flag; absent is false."""
        value = self._raw.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            self._fail(key, "true or false")
        return value

    def rank(self, key: str, default: int) -> int:
        """Read a rank."""
        value = self._raw.get(key, default)
        if not _is_rank(value):
            self._fail(key, f"an integer from 1 to {MAX_RANK}")
        return value

    def number(self, key: str, default: float) -> float:
        """Read a finite number."""
        value = self._raw.get(key, default)
        if not _is_number(value):
            self._fail(key, "a finite number")
        return float(value)

    def optional_text(self, key: str) -> str | None:
        """Read a string or nothing. It is shown and kept in databases, which NUL would end."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
            self._fail(key, f"a string of at most {MAX_TEXT} characters, none of them NUL,")
        return value

    def bias(self) -> BiasMode:
        """Read ``bias``."""
        value = self._raw.get("bias")
        if value is None or value == "none":
            return "none"
        if value == "all":
            return "all"
        if value != "lora_only":
            self._fail("bias", "'none', 'all' or 'lora_only'")
        return "lora_only"

    def names(self, key: str) -> tuple[str, ...]:
        """Read a list of names; absent is empty."""
        value = self._raw.get(key)
        if value is None:
            return ()
        if not _is_names(value):
            self._fail(key, "a list of module names")
        return tuple(value)

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str | None:
        """Read a list of names, a pattern, or nothing."""
        value = self._raw.get(key)
        if value is None or (isinstance(value, str) and value):
            return value
        if not _is_names(value):
            self._fail(key, "a list of module names or a pattern")
        return tuple(value)

    def layer_indices(self) -> tuple[int, ...] | None:
        """Read ``layers_to_transform``, a number or a list of them."""
        value = self._raw.get("layers_to_transform")
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not all(_is_integer(item) for item in items):
            self._fail("layers_to_transform", "a layer index or a list of them")
        return tuple(items)

    def layers_pattern(self) -> tuple[str, ...] | None:
        """Read ``layers_pattern``, a name or a list of them; empty is nothing."""
        value = self._raw.get("layers_pattern")
        if isinstance(value, str):
            return (value,) if value else None
        return self.names("layers_pattern") or None

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self._raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._fail(key, "an object")
        return value

    def rank_pattern(self) -> Mapping[str, int]:
        """Read LoRA's ``rank_pattern``."""
        value = self._mapping("rank_pattern")
        if not all(_is_rank(item) for item in value.values()):
            self._fail("rank_pattern", f"an object of ranks from 1 to {MAX_RANK}")
        return dict(value)

    def alpha_pattern(self) -> Mapping[str, float]:
        """Read ``alpha_pattern``."""
        value = self._mapping("alpha_pattern")
        if not all(_is_number(item) for item in value.values()):
            self._fail("alpha_pattern", "an object of finite numbers")
        return {key: float(item) for key, item in value.items()}

    def kept_ranks(self) -> Mapping[str, tuple[bool, ...]]:
        """Read AdaLoRA's ``rank_pattern``: kept ranks by module."""
        value = self._mapping("rank_pattern")
        for mask in value.values():
            if not isinstance(mask, list) or not all(isinstance(item, bool) for item in mask):
                self._fail("rank_pattern", "an object of lists of true and false (AdaLoRA)")
        # PEFT names the lora_E parameter, "model.layers.0.self_attn.q_proj.lora_E[.default]".
        return {key.partition(".lora_E")[0]: tuple(mask) for key, mask in value.items()}
