"""Which modules of the base a configuration adapts or replaces, with what rank and scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from peft.utils.other import get_pattern_key

from manylora_store.checkpoint.config import AdapterConfig
from manylora_store.compiler.canonical import BaseLayout, ModuleSpec
from manylora_store.compiler.matching import Matcher, build_matcher, matches_suffix
from manylora_store.errors import (
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterUnsupportedError,
)

ADALORA_EPSILON = 1e-5
"""What PEFT's ``SVDLinear`` adds to the rank before dividing by it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted module: the rank its stored factors have, and what ``B A`` is multiplied by."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a configuration does to a base, before looking at any tensor.

    ``targets`` are the adapted modules in the base's order and ``replaced`` those of
    ``modules_to_save``. ``shared`` maps an output head to the embedding whose factors (if it is a
    target) or whose replaced weight (if it is replaced) it shares under ``ensure_weight_tying``.
    """

    targets: Mapping[str, Target]
    replaced: frozenset[str]
    shared: Mapping[str, str]
    warnings: tuple[str, ...]


def plan_targets(config: AdapterConfig, layout: BaseLayout) -> Plan:
    """Resolve ``config`` against the modules of ``layout``, with PEFT's own matching.

    Raises:
        AdapterInvalidError: a malformed pattern, or fields that contradict each other.
        AdapterIncompatibleError: nothing in the base matches.
        AdapterUnsupportedError: a matched module is of a kind that cannot be adapted or replaced.
    """
    try:
        matcher = build_matcher(config, layout)
        targets = _targets(config, layout, matcher)
        replaced = frozenset(name for name in layout.modules if matcher.replaces(name))
        warnings = tuple(_warnings(config, layout, targets))
    except (re.error, OverflowError, RecursionError) as error:
        pattern = getattr(error, "pattern", None)
        raise AdapterInvalidError(
            "adapter_config.json: a module pattern is not a valid regular expression:"
            f" {'' if pattern is None else repr(pattern) + ': '}{error}"
        ) from error
    _check_replaced(layout, replaced, targets)
    if not targets:
        wanted = config.target_modules
        raise AdapterIncompatibleError(
            "adapter_config.json: target_modules ="
            f" {list(wanted) if isinstance(wanted, tuple) else wanted!r} matches no module of the"
            f" base (model type {layout.model_type!r})"
        )
    for name in config.kept_ranks:
        if name not in targets:
            raise AdapterIncompatibleError(
                f"adapter_config.json: rank_pattern names {name!r}, which is not a target module"
            )
    shared = {head: matcher.embedding for head in matcher.heads if matcher.embedding}
    return Plan(targets, replaced, shared, warnings)


def _targets(config: AdapterConfig, layout: BaseLayout, matcher: Matcher) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    for name, spec in layout.modules.items():
        if matcher.adapts(name):
            _check_target_kind(config, spec)
            targets[name] = _target(config, name)
    if matcher.ties_targets and matcher.embedding not in targets:
        raise AdapterInvalidError(
            "adapter_config.json: ensure_weight_tying needs an adapter on the embedding"
            f" {matcher.embedding!r}, which exclude_modules leaves out"
        )
    if matcher.ties_targets and matcher.embedding:
        # A tied head has the embedding's factors, but PEFT computes its scaling from its own rank.
        rank = targets[matcher.embedding].rank
        for head in matcher.heads:
            _check_target_kind(config, layout.modules[head])
            targets[head] = Target(rank, _target(config, head).scaling)
    return {name: targets[name] for name in layout.modules if name in targets}


def _target(config: AdapterConfig, module: str) -> Target:
    if config.peft_type == "ADALORA":
        return _adalora_target(config, module)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.rank)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.alpha)
    return Target(rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _adalora_target(config: AdapterConfig, module: str) -> Target:
    """Scaling as PEFT has it after loading: it resizes the factors but keeps the initial rank."""
    mask = config.kept_ranks.get(module)
    if mask is not None and len(mask) != config.rank:
        raise AdapterInvalidError(
            f"adapter_config.json: rank_pattern of {module!r} has {len(mask)} entries; init_r ="
            f" {config.rank} are expected"
        )
    rank = config.rank if mask is None else sum(mask)
    alpha = config.alpha if config.alpha > 0 else float(rank)
    return Target(rank, alpha / (config.rank + ADALORA_EPSILON))


def _check_target_kind(config: AdapterConfig, spec: ModuleSpec) -> None:
    if spec.kind not in ("linear", "embedding"):
        raise AdapterUnsupportedError(
            f"target module {spec.name!r} is neither linear nor an embedding ({spec.kind})"
        )
    if spec.kind == "embedding" and config.peft_type == "ADALORA":
        raise AdapterInvalidError(f"AdaLoRA cannot adapt the embedding {spec.name!r}")
    if spec.kind == "embedding" and config.lora_bias:
        raise AdapterInvalidError(
            f"adapter_config.json: lora_bias cannot be combined with the embedding {spec.name!r}"
        )


def _check_replaced(layout: BaseLayout, replaced: frozenset[str], targets: Container[str]) -> None:
    for name in sorted(replaced):
        if name in targets:
            raise AdapterUnsupportedError(
                f"module {name!r} is matched by both target_modules and modules_to_save"
            )
        if layout.modules[name].kind == "other":
            raise AdapterUnsupportedError(
                f"modules_to_save covers {name!r}, which is not a linear, embedding or norm module"
            )


def _warnings(
    config: AdapterConfig, layout: BaseLayout, targets: Mapping[str, Target]
) -> Iterator[str]:
    patterns = [("rank_pattern", pattern) for pattern in config.rank_pattern]
    patterns += [("alpha_pattern", pattern) for pattern in config.alpha_pattern]
    for field, pattern in patterns:
        if all(get_pattern_key([pattern], name) != pattern for name in targets):
            yield f"{field} {pattern!r} matches no target module"
    for name in config.modules_to_save:
        if not any(matches_suffix(module, [name]) for module in layout.modules):
            yield f"modules_to_save {name!r} matches no module of the base"
