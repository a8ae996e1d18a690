"""From a PEFT adapter folder to the canonical algebra."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import torch

from manylora_store.checkpoint.folder import AdapterFiles
from manylora_store.checkpoint.tensors import read_tensors
from manylora_store.checkpoint.weights import WeightFile
from manylora_store.compiler.accounting import Ledger
from manylora_store.compiler.base_changes import BaseChanges, find_base_changes
from manylora_store.compiler.canonical import (
    BaseLayout,
    CompiledAdapter,
    ModulePatch,
    ModuleSpec,
    nonlinear_parts,
)
from manylora_store.compiler.lowrank import (
    dora_scale,
    low_rank,
    read_factors,
    share_embedding_factors,
)
from manylora_store.compiler.preparation import prepare
from manylora_store.compiler.targets import Plan
from manylora_store.errors import AdapterInvalidError, AdapterUnsupportedError
from manylora_store.records import AdapterRecord

Tensors = dict[str, torch.Tensor]


def compile_adapter(files: AdapterFiles, layout: BaseLayout) -> CompiledAdapter:
    """Compile the adapter in ``files`` for the base described by ``layout``.

    For every module the patches reproduce the module's output under
    ``PeftModel.from_pretrained`` (equations in ``canonical``). Every tensor of the file has an
    effect, is known to have none, or is the reason of a refusal.

    Raises:
        AdapterInvalidError: the file contradicts its configuration, or holds non-finite values.
        AdapterIncompatibleError: the adapter is for another base.
        AdapterUnsupportedError: a part of it cannot be computed exactly.
    """
    plan, ledger = prepare(files, layout)
    tensors = _read_finite(files.weights, skip=ledger.copies)
    changes = find_base_changes(ledger.base, tensors, files.weights.header, plan, layout)
    compiler = _Compiler(plan, ledger, tensors, changes, layout)
    patches = {}
    for name in layout.modules:
        patch = compiler.patch(name)
        if patch is not None:
            patches[name] = patch
    warnings = [
        *files.warnings,
        *plan.warnings,
        *_warnings(files, ledger, changes, patches.values()),
    ]
    idle = {*ledger.copies, *changes.unchanged}
    record = AdapterRecord(
        name=files.name,
        digest=files.digest,
        peft_type=files.config.peft_type,
        rank=max((target.rank for target in plan.targets.values()), default=0),
        ranks={name: target.rank for name, target in plan.targets.items()},
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in plan.targets})),
        parameters=sum(tensor.numel() for key, tensor in tensors.items() if key not in idle),
        bytes=files.weights.size,
        base_model=files.config.base_model,
        created_at=time.time(),
        source=files.source,
        warnings=tuple(warnings),
        unmixable=_unmixable(patches),
    )
    return CompiledAdapter(record, patches)


def _read_finite(weights: WeightFile, skip: Iterable[str]) -> Tensors:
    """Read the tensors in float32."""
    skipped = set(skip)
    tensors = {}
    for name, stored in read_tensors(weights):
        tensor = stored.to(torch.float32)
        # A sum is finite only if every value is, and is had in a tenth of the time.
        if not math.isfinite(tensor.sum().item()):
            _refuse_non_finite(name, tensor)
        if name not in skipped:
            tensors[name] = tensor
    return tensors


def _refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise AdapterInvalidError(
            f"tensor {name!r} has {bad} of {tensor.numel()} values that are not finite in"
            " float32 (NaN or infinity)"
        )


class _Compiler:
    """Holds what the patches of one adapter are made from."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        tensors: Tensors,
        changes: BaseChanges,
        layout: BaseLayout,
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._tensors = tensors
        self._changes = changes
        self._layout = layout

    def patch(self, name: str) -> ModulePatch | None:
        """Return what the adapter does to module ``name``, or ``None`` for nothing."""
        spec = self._layout.modules[name]
        if name in self._plan.replaced:
            return ModulePatch(replacement=self._replaced(spec))
        changed = self._changes.parameters.get(name, {})
        replacement: dict[str, torch.Tensor] | None = None
        if "weight" in changed or (changed and spec.kind == "embedding"):
            replacement = {
                parameter: changed[parameter]
                if parameter in changed
                else self._layout.weight(name, parameter)
                for parameter in spec.parameters
            }
        if name in self._plan.targets:
            return self._adapted(spec, changed, replacement)
        shift = None
        if "bias" in changed and replacement is None:
            shift = changed["bias"] - self._layout.weight(name, "bias")
        if replacement is None and shift is None:
            return None
        return ModulePatch(shift=shift, replacement=replacement)

    def _adapted(
        self,
        spec: ModuleSpec,
        changed: Mapping[str, torch.Tensor],
        replacement: Mapping[str, torch.Tensor] | None,
    ) -> ModulePatch:
        """Patch of an adapted module.

        PEFT computes ``g * (W x + s B A x) + b' + s beta`` with the adapter's own base bias ``b'``
        and ``lora_B``'s bias ``beta``; the module computes ``W x + b`` and the algebra multiplies
        that by ``g``, so ``shift = b' - g * b + s beta``.
        """
        target = self._plan.targets[spec.name]
        factors = read_factors(self._factor_tensors(spec.name))
        scale = None
        if factors.magnitude is not None:
            weight = (replacement or {}).get("weight")
            if weight is None:
                weight = self._layout.weight(spec.name, "weight")
            scale = dora_scale(factors, target, spec, weight)
        shift = None
        if "bias" in spec.parameters and (scale is not None or "bias" in changed):
            seen = (replacement or {}).get("bias")
            if seen is None:
                seen = self._layout.weight(spec.name, "bias")
            shift = changed.get("bias", seen) - (seen if scale is None else scale * seen)
        if factors.bias is not None:
            beta = target.scaling * factors.bias
            shift = beta if shift is None else shift + beta
        return ModulePatch(
            low_rank=low_rank(factors, target, spec),
            output_scale=scale,
            shift=shift,
            replacement=replacement,
        )

    def _factor_tensors(self, name: str) -> Tensors:
        slots = self._tensors_of(self._ledger.factors.get(name, {}))
        embedding = self._plan.shared.get(name)
        if embedding is None:
            return slots
        shared = self._tensors_of(self._ledger.factors[embedding])
        return share_embedding_factors(slots, shared, name)

    def _replaced(self, spec: ModuleSpec) -> Tensors:
        own = self._tensors_of(self._ledger.replaced.get(spec.name, {}))
        embedding = self._plan.shared.get(spec.name)
        if embedding is None:
            return own
        if set(spec.parameters) != {"weight"}:
            raise AdapterUnsupportedError(
                f"ensure_weight_tying: PEFT would drop the {spec.name!r} parameters other than"
                f" weight ({', '.join(sorted(spec.parameters))})"
            )
        weight = self._tensors[self._ledger.replaced[embedding]["weight"]]
        if "weight" in own and not torch.equal(own["weight"], weight):
            raise AdapterInvalidError(
                f"ensure_weight_tying is set, but the weight of module {spec.name!r} differs from"
                f" that of {embedding!r} it is tied to"
            )
        return {"weight": weight}

    def _tensors_of(self, slots: Mapping[str, str]) -> Tensors:
        return {slot: self._tensors[key] for slot, key in slots.items()}


def _warnings(
    files: AdapterFiles, ledger: Ledger, changes: BaseChanges, patches: Iterable[ModulePatch]
) -> Iterable[str]:
    for key in changes.unchanged:
        yield f"tensor {key!r} equals the base's own and has no effect"
    biases = [slots for slots in ledger.base.values() if "bias" in slots]
    if files.config.bias == "lora_only" and not biases:
        yield "bias = 'lora_only', but the file holds no biases; the base's are used"
    if not any(_has_effect(patch) for patch in patches):
        yield "the adapter has no effect: every low-rank product is zero and nothing else changes"


_NOT_LINEAR = {
    "output_scale": ("scales the outputs", " (DoRA)"),
    "replacement": ("replaces the weights", " (modules_to_save, or trained embeddings)"),
}


def _unmixable(patches: Mapping[str, ModulePatch]) -> str | None:
    """Return which part of which module keeps the adapter from being weighted and summed."""
    found: dict[str, list[str]] = {}
    for module, patch in patches.items():
        for part in nonlinear_parts(patch):
            found.setdefault(part, []).append(module)
    reasons = []
    for part, modules in found.items():
        what, how = _NOT_LINEAR.get(part, (f"changes the {part}", ""))
        more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        reasons.append(f"it {what} of {modules[0]!r}{more}{how}")
    return "; ".join(reasons) or None


def _has_effect(patch: ModulePatch) -> bool:
    low = patch.low_rank
    return (
        patch.replacement is not None
        or (low is not None and low.scaling != 0 and bool(low.a.any()) and bool(low.b.any()))
        or (patch.shift is not None and bool(patch.shift.any()))
        or (
            patch.output_scale is not None
            and not torch.allclose(patch.output_scale, torch.ones(()), rtol=1e-5, atol=0)
        )
    )
