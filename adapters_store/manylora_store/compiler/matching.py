"""The configuration PEFT's own matching runs on: defaults, shorthands and ties resolved.

Mirrors ``_prepare_adapter_config``, ``_maybe_include_all_linear_layers`` and
``_check_tied_modules`` of PEFT's tuners, which take the model itself rather than its layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import match_target_against_key

from manylora_store.checkpoint.config import AdapterConfig
from manylora_store.compiler.canonical import BaseLayout
from manylora_store.errors import AdapterInvalidError

Targets = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Matcher:
    """Answers which modules are adapted or replaced.

    ``embedding`` and ``heads`` are set where ``ensure_weight_tying`` ties something: then the heads
    follow the embedding, whose factors (``ties_targets``) or replaced weight they share.
    """

    config: LoraConfig
    replaced_names: tuple[str, ...]
    ties_targets: bool
    embedding: str | None
    heads: tuple[str, ...]

    def adapts(self, module: str) -> bool:
        """Whether PEFT would put an adapter on ``module`` of its own accord (not by a tie)."""
        if self.ties_targets and module in self.heads:
            return False
        return bool(check_target_module_exists(self.config, module))

    def replaces(self, module: str) -> bool:
        """Whether PEFT would replace ``module``, by itself or with a module it is part of."""
        if module in self.heads and not self.ties_targets:
            return True
        return matches_suffix(module, self.replaced_names)


def build_matcher(config: AdapterConfig, layout: BaseLayout) -> Matcher:
    """Resolve defaults, ``all-linear`` and ties of ``config`` against ``layout``.

    Raises:
        AdapterInvalidError: no ``target_modules``, and PEFT has no default for the model type.
        re.error: a name that is not a valid regular expression where PEFT uses it as one.
    """
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(config, layout)
    replaced = config.modules_to_save
    embedding = _tied_embedding(layout) if config.ensure_weight_tying else None
    heads = tied_modules(layout, embedding) if embedding else ()
    ties_targets = False
    if embedding and any(_last(name) in EMBEDDING_LAYER_NAMES for name in replaced):
        replaced = (*(name for name in replaced if not _covers(name, heads)), embedding)
    elif embedding and _targets_embedding(targets):
        ties_targets = True
        if isinstance(targets, str):
            targets = rf"(?:{targets}|^{re.escape(embedding)}$)"
        else:
            targets = (*(name for name in targets if not _covers(name, heads)), embedding)
    else:
        embedding, heads = None, ()
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        targets = tuple(
            name
            for name, spec in layout.modules.items()
            if spec.kind == "linear" and not spec.is_output_head
        )
    peft_config = LoraConfig(
        target_modules=_as_peft(targets),
        exclude_modules=_as_peft(config.exclude_modules),
        layers_to_transform=_as_peft(config.layers_to_transform),
        layers_pattern=_as_peft(config.layers_pattern),
        modules_to_save=list(replaced),
    )
    return Matcher(peft_config, replaced, ties_targets, embedding, heads)


def tied_modules(layout: BaseLayout, name: str) -> tuple[str, ...]:
    """Names of the other modules whose weight is the same parameter as that of ``name``."""
    own = layout.modules[name].tied_to
    return tuple(
        other
        for other, spec in layout.modules.items()
        if other != name and (other == own or spec.tied_to in {name, own} - {None})
    )


def matches_suffix(module: str, names: Iterable[str]) -> bool:
    """Whether ``module`` or a module it is part of ends in one of ``names``.

    As in PEFT's ``modules_to_save``, any string suffix will do: ``norm`` covers
    ``input_layernorm``.
    """
    parts = module.split(".")
    ancestry = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(path.endswith(name) for path in ancestry for name in names)


def _default_targets(config: AdapterConfig, layout: BaseLayout) -> Targets:
    mapping = (
        TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
        if config.peft_type == "ADALORA"
        else TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    found = mapping.get(layout.model_type)
    if found is None:
        raise AdapterInvalidError(
            "adapter_config.json: target_modules is missing and PEFT has no default for model type"
            f" {layout.model_type!r}"
        )
    return found if isinstance(found, str) else tuple(found)


def _targets_embedding(targets: Targets) -> bool:
    if isinstance(targets, str):
        return any(match_target_against_key(targets, name) for name in EMBEDDING_LAYER_NAMES)
    return any(_last(name) in EMBEDDING_LAYER_NAMES for name in targets)


def _tied_embedding(layout: BaseLayout) -> str | None:
    for name, spec in layout.modules.items():
        if spec.kind == "embedding" and tied_modules(layout, name):
            return name
    return None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _covers(name: str, modules: Iterable[str]) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for module in modules)


def _as_peft(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
