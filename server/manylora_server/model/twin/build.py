"""Makes a twin's modules, a few rows at a time. The base is read and never written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from manylora_server.model.twin.exact import ExactModule
from manylora_server.model.twin.fidelity import Fidelity
from manylora_server.model.twin.pace import Pace
from manylora_server.model.twin.storage import StoragePlan, with_parameters
from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter, ModulePatch, ModuleSpec


@dataclass(frozen=True, slots=True)
class BuiltModules:
    """The modules that the adapter changes, merged, and what rounding left of each change."""

    modules: Mapping[str, nn.Module]
    fidelity: Mapping[str, Fidelity]


def twin_bytes(adapter: CompiledAdapter, layout: BaseLayout, plan: StoragePlan) -> int:
    """Return the memory of a twin's own weights; the rest it shares with the base."""
    return sum(plan.bytes(layout.modules[name]) for name in adapter.patches)


@torch.inference_mode()
def build_modules(
    adapter: CompiledAdapter,
    layout: BaseLayout,
    original: Callable[[str], nn.Module],
    plan: StoragePlan,
    pace: Pace,
) -> Generator[None, None, BuiltModules]:
    """Merge ``adapter`` into copies of the modules it changes; yields between two pieces.

    ``original`` returns the base's own module of a name. ``OverflowError`` where a weight is not
    finite once rounded.
    """
    modules: dict[str, nn.Module] = {}
    fidelity: dict[str, Fidelity] = {}
    for name, patch in adapter.patches.items():
        spec = layout.modules[name]
        if spec.kind == "norm":
            modules[name] = _norm(original(name), patch, plan)
            continue
        exact = ExactModule(original(name), spec, patch, plan.device)
        fidelity[name] = Fidelity()
        modules[name] = yield from _weight(exact, spec, plan, pace, fidelity[name])
        if not math.isfinite(fidelity[name].missed):
            raise OverflowError(f"module {name}: weights are not finite as {plan.name}")
    return BuiltModules(modules, fidelity)


def _weight(
    exact: ExactModule, spec: ModuleSpec, plan: StoragePlan, pace: Pace, fidelity: Fidelity
) -> Generator[None, None, nn.Module]:
    storage = plan.storage(spec)
    start = 0
    while start < exact.rows:
        begun = time.perf_counter()
        stop = min(start + pace.rows(exact.columns), exact.rows)
        base = exact.base_rows(start, stop)
        merged = exact.merged_rows(start, stop, base)
        fidelity.add(base, merged, storage.store(start, merged))
        pace.took((stop - start) * exact.columns, time.perf_counter() - begun)
        start = stop
        yield
    bias = exact.bias() if spec.kind == "linear" else None
    return storage.finish(bias)


def _norm(base: nn.Module, patch: ModulePatch, plan: StoragePlan) -> nn.Module:
    parameters = dict(patch.replacement or {})
    if patch.shift is not None:
        bias = parameters.get("bias", base.bias)
        assert isinstance(bias, torch.Tensor), "a bias was trained, so there is one"
        parameters["bias"] = bias.detach().to("cpu", torch.float32) + patch.shift

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(plan.device, plan.dtype)

    return with_parameters(base, parameters, placed)
