"""Parameters of the base that come with an adapter: what they change, ties included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manylora_store.checkpoint.header import TensorInfo
from manylora_store.compiler.accounting import Slots
from manylora_store.compiler.canonical import BaseLayout
from manylora_store.compiler.matching import tied_modules
from manylora_store.compiler.targets import Plan
from manylora_store.errors import AdapterInvalidError, AdapterUnsupportedError


@dataclass(frozen=True, slots=True)
class BaseChanges:
    """``parameters[module][name]`` is a base parameter's new value; ``unchanged`` lists the tensors
    that say what the base says already."""

    parameters: Mapping[str, Mapping[str, torch.Tensor]]
    unchanged: tuple[str, ...]


def find_base_changes(
    slots: Slots,
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, TensorInfo],
    plan: Plan,
    layout: BaseLayout,
) -> BaseChanges:
    """Compare base parameters of a file with the base's own.

    PEFT loads them into the base's parameters, so the weight of a tied module changes with its
    partner's; a module in ``modules_to_save`` has a copy of its own and does not. Trained biases
    count as changed unless they are bitwise equal. Embedding and head weights are saved untrained;
    they count as unchanged if they are equal once rounded to a dtype either may have had.

    Raises:
        AdapterInvalidError: two modules share a weight, and the file gives them different ones.
        AdapterUnsupportedError: a parameter of a module that cannot be replaced is changed.
    """
    parameters: dict[str, dict[str, torch.Tensor]] = {}
    unchanged: list[str] = []
    for module, keys in slots.items():
        for slot, key in keys.items():
            base = layout.weight(module, slot)
            if _same(tensors[key], base, header[key].dtype, exact=slot == "bias"):
                unchanged.append(key)
                continue
            if layout.modules[module].kind == "other":
                raise AdapterUnsupportedError(
                    f"tensor {key!r} changes module {module!r}, which is not a linear, embedding or"
                    " norm module"
                )
            parameters.setdefault(module, {})[slot] = tensors[key]
    _spread_over_ties(parameters, slots, tensors, plan, layout)
    return BaseChanges(parameters, tuple(unchanged))


def _spread_over_ties(
    parameters: dict[str, dict[str, torch.Tensor]],
    slots: Slots,
    tensors: Mapping[str, torch.Tensor],
    plan: Plan,
    layout: BaseLayout,
) -> None:
    for module in [name for name, changed in parameters.items() if "weight" in changed]:
        weight = parameters[module]["weight"]
        for partner in tied_modules(layout, module):
            given = slots.get(partner, {}).get("weight")
            if given is not None and not torch.equal(tensors[given], weight):
                raise AdapterInvalidError(
                    f"modules {module!r} and {partner!r} share one weight in the base, but tensors"
                    f" {slots[module]['weight']!r} and {given!r} differ"
                )
            if partner not in plan.replaced:
                parameters.setdefault(partner, {})["weight"] = weight


def _same(tensor: torch.Tensor, base: torch.Tensor, stored: str, *, exact: bool) -> bool:
    if exact or torch.equal(tensor, base):
        return torch.equal(tensor, base)
    dtypes = {getattr(torch, stored), torch.bfloat16, torch.float16}
    return any(torch.equal(tensor.to(dtype), base.to(dtype)) for dtype in dtypes)
