"""What a merged checkpoint will consist of, known before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from manylora_server.core.errors import AdapterRefusedError
from manylora_server.export.base import BaseCheckpoint, check_parameters
from manylora_server.export.naming import Naming
from manylora_server.export.sources import Rows, Source, reading
from manylora_store.compiler.canonical import LowRank, ModulePatch, ModuleSpec
from manylora_store.errors import AdapterError, AdapterUnsupportedError
from manylora_store.export.merging import changes, check_mergeable, merged_bias, merged_rows

_TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """One tensor of the result.

    ``parameter`` is what it is loaded into (empty for what transformers converts or ignores).
    ``opened`` gives its rows, in float32 if ``merged``, else as the base has them.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    merged: bool
    opened: Callable[[], AbstractContextManager[Rows]]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The tensors of the merged checkpoint, and the configuration under which they are loaded.

    ``untied`` are modules that shared a weight in the base and have one each now; ``added_biases``
    parameters that the base did not have.
    """

    tensors: Sequence[MergedTensor]
    config: Mapping[str, Any]
    naming: Naming
    untied: tuple[str, ...]
    added_biases: tuple[str, ...]


def plan_merge(base: BaseCheckpoint, patches: Mapping[str, ModulePatch]) -> MergePlan:
    """Plan the checkpoint that computes what ``base`` with ``patches`` does.

    Where an adapter changes one end of a tie, or both differently, the ends become two tensors and
    ``tie_word_embeddings`` false. Where it adds biases that the base has not, the configuration's
    switch for them is set, and biases that come with the switch are zero.

    Raises:
        AdapterRefusedError: something that no checkpoint of this architecture can hold.
    """
    try:
        return _Planner(base, patches).plan()
    except AdapterError as error:
        raise AdapterRefusedError(error, param="adapters") from error


class _Planner:
    def __init__(self, base: BaseCheckpoint, patches: Mapping[str, ModulePatch]) -> None:
        self._base = base
        self._specs = base.layout.modules
        self._patches = patches
        for name, patch in patches.items():
            check_mergeable(self._specs[name], patch)

    def plan(self) -> MergePlan:
        base = self._base
        config = {k: v for k, v in base.config.items() if k != "quantization_config"}
        untied = [name for tie in self._ties() if not self._holds(tie) for name in tie]
        if untied:
            config[_TIE] = False
        config.update(self._switches(config))
        naming = Naming(config, base.folder)
        parameters = {key: parameter for parameter, key in base.keys.items()}
        tensors = [
            self._tensor(key, parameters.get(key, ""), source)
            for key, source in base.sources.items()
        ]
        for name in untied:
            if f"{name}.weight" not in base.keys:
                parameter = f"{name}.weight"
                tensors.append(
                    self._tensor(base.naming.key_of(parameter), parameter, self._partner(name))
                )
        added = tuple(name for name in naming.parameters if name not in base.naming.parameters)
        tensors += [self._new_bias(name, naming) for name in added]
        self._check(tensors, naming)
        return MergePlan(tensors, config, naming, tuple(untied), added)

    def _tensor(self, key: str, parameter: str, source: Source) -> MergedTensor:
        module, _, slot = parameter.rpartition(".")
        patch = self._patches.get(module)
        form = source.form
        if patch is None or not changes(patch, slot):
            return MergedTensor(
                key, parameter, form.shape, form.dtype, False, lambda: reading(source)
            )
        return MergedTensor(
            key,
            parameter,
            form.shape,
            form.dtype,
            True,
            lambda: _merged(self._specs[module], patch, slot, source),
        )

    def _new_bias(self, parameter: str, naming: Naming) -> MergedTensor:
        module = parameter.rpartition(".")[0]
        patch = self._patches.get(module)
        shape = tuple(naming.parameters[parameter].shape)
        zeros = torch.zeros(shape)
        values = zeros if patch is None or patch.shift is None else merged_bias(patch, None)
        weight = self._base.keys.get(f"{module}.weight", "")
        key = weight.removesuffix("weight") + "bias" if weight else naming.key_of(parameter)
        return MergedTensor(key, parameter, shape, self._base.dtype, True, lambda: _given(values))

    def _ties(self) -> list[list[str]]:
        """Return the groups of modules that share a weight."""
        groups: dict[str, list[str]] = {}
        for name, spec in self._specs.items():
            if spec.tied_to is not None:
                groups.setdefault(spec.tied_to, [spec.tied_to]).append(name)
        return list(groups.values())

    def _holds(self, tie: Sequence[str]) -> bool:
        """Whether the adapters make the same weight of all modules of a tie."""
        found = [
            (self._specs[name], patch)
            for name in tie
            if (patch := self._patches.get(name)) is not None and changes(patch, "weight")
        ]
        if not found:
            return True
        first, *others = found
        return len(found) == len(tie) and all(_same_weight(first, other) for other in others)

    def _partner(self, module: str) -> Source:
        tie = next(tie for tie in self._ties() if module in tie)
        names = [f"{name}.weight" for name in tie]
        return self._base.sources[
            next(self._base.keys[name] for name in names if name in self._base.keys)
        ]

    def _switches(self, config: Mapping[str, Any]) -> dict[str, bool]:
        """Return settings under which the model has the biases that adapters add to it."""
        wanted = {
            f"{name}.bias"
            for name, patch in self._patches.items()
            if patch.shift is not None and "bias" not in self._specs[name].parameters
        }
        if not wanted:
            return {}
        known = set(self._base.naming.parameters)
        defaults = self._base.naming.model.config.to_dict()
        off = sorted(key for key, value in defaults.items() if "bias" in key and value is False)
        for count in range(1, len(off) + 1):
            for names in combinations(off, count):
                switches = dict.fromkeys(names, True)
                new = set(Naming({**config, **switches}, self._base.folder).parameters) - known
                if wanted <= new and all(name.endswith(".bias") for name in new):
                    return switches
        missing = sorted(wanted)[0].rpartition(".")[0]
        raise AdapterUnsupportedError(
            f"adapters: one adds a bias to module {missing!r}, and {config['model_type']} has no "
            "setting under which that has one (lora_bias)"
        )

    def _check(self, tensors: Sequence[MergedTensor], naming: Naming) -> None:
        """Hold the plan against the model that will load it, and the adapters against the plan."""
        merged = {tensor.parameter for tensor in tensors if tensor.merged}
        for name, patch in self._patches.items():
            spec = self._specs[name]
            for slot in {*spec.parameters, *(("bias",) if patch.shift is not None else ())}:
                parameter = f"{name}.{slot}"
                if changes(patch, slot) and parameter not in merged and not self._covered(name):
                    raise AdapterUnsupportedError(
                        f"adapters: {parameter!r} is stored in another form in this checkpoint, "
                        "into which nothing can be merged"
                    )
        shapes = {t.parameter: t.shape for t in tensors if t.parameter}
        check_parameters(naming, shapes, self._base.converted, self._base.folder)

    def _covered(self, module: str) -> bool:
        """Whether a tie that holds carries the module's change under its partner's name."""
        return any(module in tie and self._holds(tie) for tie in self._ties())


def _same_weight(
    first: tuple[ModuleSpec, ModulePatch], second: tuple[ModuleSpec, ModulePatch]
) -> bool:
    """Whether two modules' patches make the same of the weight ``[vocab, width]`` they share."""
    one, other = first[1], second[1]
    if one.output_scale is not None or other.output_scale is not None:
        return False
    if one.replacement is not None and other.replacement is not None:
        if one.low_rank is not None or other.low_rank is not None:
            return False
        return torch.equal(one.replacement["weight"], other.replacement["weight"])
    if one.low_rank is None or other.low_rank is None:
        return False
    return _mirrored(
        *(
            replace(low, scaling=low.scaling / spec.output_multiplier)
            for spec, low in ((first[0], one.low_rank), (second[0], other.low_rank))
        )
    )


def _mirrored(one: LowRank, other: LowRank) -> bool:
    """Whether an embedding's product is an output head's, whose factors change places."""
    return (
        one.scaling == other.scaling
        and one.a.shape == other.b.shape
        and one.b.shape == other.a.shape
        and torch.equal(one.a, other.b)
        and torch.equal(one.b, other.a)
    )


@contextmanager
def _merged(spec: ModuleSpec, patch: ModulePatch, slot: str, source: Source) -> Iterator[Rows]:
    if slot == "weight" and spec.kind in ("linear", "embedding"):
        with reading(source) as base_rows:
            yield lambda start, stop: merged_rows(spec, patch, base_rows, start, stop)
        return
    if slot == "bias":
        values = merged_bias(patch, source.rows(0, source.form.shape[0]))
    else:
        assert patch.replacement is not None, f"{spec.name}.{slot}"
        values = patch.replacement[slot].float()
    yield lambda start, stop: values[start:stop]


@contextmanager
def _given(values: torch.Tensor) -> Iterator[Rows]:
    yield lambda start, stop: values[start:stop]
