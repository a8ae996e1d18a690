"""Every tensor of a file is given its place, or the file is refused. No tensor is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from manylora_store.checkpoint.config import AdapterConfig
from manylora_store.checkpoint.header import TensorInfo
from manylora_store.checkpoint.names import PREFIX, TensorName, parse_name
from manylora_store.compiler.canonical import BaseLayout, ModuleSpec
from manylora_store.compiler.targets import Plan, Target
from manylora_store.errors import (
    AdapterIncompatibleError,
    AdapterInvalidError,
    AdapterUnsupportedError,
)

Slots = dict[str, dict[str, str]]
"""Module name to slot to the tensor's name in the file."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where each tensor goes.

    ``factors`` belong to adapted modules, ``replaced`` are parameters of modules in
    ``modules_to_save``, ``base`` are parameters that PEFT would load into the base's own modules,
    and ``copies`` are second copies of replaced parameters, which PEFT never reads.
    """

    factors: Slots = field(default_factory=dict)
    replaced: Slots = field(default_factory=dict)
    base: Slots = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)


def account(
    header: Mapping[str, TensorInfo], config: AdapterConfig, plan: Plan, layout: BaseLayout
) -> Ledger:
    """Give every tensor of ``header`` its place.

    Raises:
        AdapterIncompatibleError: a tensor for a module or parameter the base does not have, or of
            another shape than the base asks for.
        AdapterUnsupportedError: a tensor whose name is not understood.
        AdapterInvalidError: a tensor the configuration does not call for, a tensor given twice, a
            rank other than the configuration's, or a missing tensor.
    """
    ledger = Ledger()
    for key, info in header.items():
        name = parse_name(key, layout.modules)
        spec = layout.modules[name.module]
        if name.origin == "factor":
            _place_factor(ledger, name, info, config, plan, spec)
        elif name.origin == "copy":
            if name.module not in plan.replaced:
                _refuse(name, f"module {name.module!r} is not in modules_to_save")
            ledger.copies.append(key)
        else:
            _place_parameter(ledger, name, info, config, plan, spec)
    _check_complete(ledger, config, plan, layout)
    return ledger


def expected_factors(
    config: AdapterConfig, spec: ModuleSpec, target: Target
) -> dict[str, tuple[int, ...]]:
    """Slots and shapes of the tensors that PEFT saves for one adapted module."""
    out_features, in_features = spec.shape
    rank = target.rank
    if config.peft_type == "ADALORA":
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank), "lora_E": (rank, 1)}
    if spec.kind == "embedding":
        vocabulary, width = spec.shape
        shapes = {"lora_embedding_A": (rank, vocabulary), "lora_embedding_B": (width, rank)}
        magnitude = width
    else:
        shapes = {"lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank)}
        magnitude = out_features
    extra: dict[str, tuple[int, ...]] = {}
    if config.lora_bias:
        extra["lora_B.bias"] = (out_features,)
    if config.use_dora:
        extra["lora_magnitude_vector"] = (magnitude,)
    return {**shapes, **extra}


def _place_factor(
    ledger: Ledger,
    name: TensorName,
    info: TensorInfo,
    config: AdapterConfig,
    plan: Plan,
    spec: ModuleSpec,
) -> None:
    target = plan.targets.get(name.module)
    if target is None:
        _refuse(name, f"the configuration does not target module {name.module!r}")
    expected = expected_factors(config, spec, target)
    if name.slot not in expected:
        _refuse(
            name,
            f"the configuration calls for {', '.join(sorted(expected))} on module"
            f" {name.module!r} ({spec.kind}), not for {name.slot}",
        )
    _check_factor_shape(name, info.shape, expected[name.slot], target.rank)
    _put(ledger.factors, name)


def _check_factor_shape(
    name: TensorName, found: tuple[int, ...], expected: tuple[int, ...], rank: int
) -> None:
    if found == expected:
        return
    axis = {
        "lora_A": 0,
        "lora_E": 0,
        "lora_embedding_A": 0,
        "lora_B": 1,
        "lora_embedding_B": 1,
    }.get(name.slot.removesuffix(".weight"))
    if axis is not None and len(found) == 2 and found[1 - axis] == expected[1 - axis]:
        raise AdapterInvalidError(
            f"tensor {name.key!r} has shape {list(found)}, so rank {found[axis]}; the configuration"
            f" says rank {rank}, so shape {list(expected)} is expected"
        )
    _mismatch(name, found, expected)


def _place_parameter(
    ledger: Ledger,
    name: TensorName,
    info: TensorInfo,
    config: AdapterConfig,
    plan: Plan,
    spec: ModuleSpec,
) -> None:
    expected = spec.parameters.get(name.slot)
    if expected is None and name.slot not in ("weight", "bias"):
        raise AdapterUnsupportedError(
            f"tensor {name.key!r} is not understood: module {name.module!r} of the base has no"
            f" part {name.slot!r} that a LoRA adapter adds or replaces"
        )
    if expected is None:
        raise AdapterIncompatibleError(
            f"tensor {name.key!r} is for parameter {name.slot!r}, but module {name.module!r} of the"
            f" base has only {', '.join(sorted(spec.parameters)) or 'none'}"
        )
    if name.module in plan.replaced and name.origin == "own":
        place = ledger.replaced
    elif name.origin == "base_layer" and name.module not in plan.targets:
        _refuse(name, f"the configuration does not target module {name.module!r}")
    elif _base_parameter_expected(name.slot, config, plan, spec):
        place = ledger.base
    else:
        _refuse(
            name,
            f"neither modules_to_save nor bias = {config.bias!r} calls for the {name.slot} of"
            f" module {name.module!r}",
        )
    if info.shape != expected:
        _mismatch(name, info.shape, expected)
    _put(place, name)


def _base_parameter_expected(
    slot: str, config: AdapterConfig, plan: Plan, spec: ModuleSpec
) -> bool:
    """Whether PEFT saves this parameter of the base: by ``bias``, or with the embeddings."""
    if spec.is_output_head or spec.kind == "embedding":
        return True
    return slot == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and spec.name in plan.targets)
    )


def _check_complete(ledger: Ledger, config: AdapterConfig, plan: Plan, layout: BaseLayout) -> None:
    for module, target in plan.targets.items():
        expected = set(expected_factors(config, layout.modules[module], target))
        if module in plan.shared:
            expected -= {"lora_A.weight", "lora_B.weight"}
        _check_present(module, expected, ledger.factors, "target module")
    for module in sorted(plan.replaced - set(plan.shared)):
        expected = set(layout.modules[module].parameters)
        _check_present(module, expected, ledger.replaced, "module of modules_to_save")


def _check_present(module: str, expected: set[str], present: Slots, what: str) -> None:
    missing = sorted(expected - set(present.get(module, {})))
    if missing:
        raise AdapterInvalidError(
            f"{what} {module!r} lacks tensor {PREFIX + module + '.' + missing[0]!r}"
        )


def _put(slots: Slots, name: TensorName) -> None:
    taken = slots.setdefault(name.module, {})
    if name.slot in taken:
        raise AdapterInvalidError(
            f"tensors {taken[name.slot]!r} and {name.key!r} are both {name.slot} of module"
            f" {name.module!r}"
        )
    taken[name.slot] = name.key


def _refuse(name: TensorName, why: str) -> NoReturn:
    raise AdapterInvalidError(f"tensor {name.key!r} has no place: {why}")


def _mismatch(name: TensorName, found: tuple[int, ...], expected: tuple[int, ...]) -> NoReturn:
    raise AdapterIncompatibleError(
        f"tensor {name.key!r} has shape {list(found)}; the base expects {list(expected)}"
    )
