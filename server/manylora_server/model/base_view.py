"""The loaded base once more: further module trees over the weights that are in memory already.

The engine wraps modules of the served tree in place, so who wants the base as it was loaded takes a
``BaseView`` before that. Its trees have modules and a configuration of their own, which may be
wrapped and changed at will, and share every weight.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from manylora_server.model.experts import NF4Experts
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.stand_in import (
    Conv1DStandIn,
    EmbeddingStandIn,
    LinearStandIn,
    PackedLayer,
    StandIn,
)
from manylora_store.compiler.canonical import BaseLayout, ModuleSpec


class BaseView:
    """The base as it was when the view was taken: after the self-test, before any wrapper.

    Takes no memory to speak of. Thread-safe.
    """

    def __init__(self, model: nn.Module) -> None:
        self._template = _copy_tree(model)

    @property
    def quantized(self) -> bool:
        """Whether any weight is in 4 bits."""
        return any(isinstance(m, NF4Linear | NF4Experts) for m in self._template.modules())

    def tree(self) -> Any:
        """Return a new tree with the modules, and the attention, that the view was taken with."""
        return _copy_tree(self._template)

    def tree_with(self, modules: Mapping[str, nn.Module]) -> Any:
        """Return a new tree in which ``modules`` are in the places of the base's, by name."""
        tree = self.tree()
        for name, module in modules.items():
            _put(tree, name, module)
        return tree

    def ordinary_tree(
        self, layout: BaseLayout, dtype: torch.dtype, written: Mapping[str, Collection[str]]
    ) -> Any:
        """Return a new tree as transformers would have loaded it: eager attention, no own layers.

        Packed layers are hidden behind stand-ins (``stand_in``), ties between weights are as in
        the checkpoint (``layout``). ``dtype`` is that of activations. ``written`` names, by module,
        the parameters that the caller is going to load something into: these are copies.
        """
        tree = self.tree()
        tree.set_attn_implementation("eager")
        # Where accelerate or PEFT find this, they put hooks on the modules.
        tree.__dict__.pop("hf_device_map", None)
        for name, spec in layout.modules.items():
            layer = tree.get_submodule(name)
            if isinstance(layer, PackedLayer):
                _put(tree, name, _ordinary(layer, tree, spec, dtype))
        for name, parameters in written.items():
            for parameter in parameters:
                layer = tree.get_submodule(name)
                if not isinstance(layer, StandIn):
                    _make_private(tree, layer, parameter)
                elif parameter != "bias":  # which is a copy already
                    _unpack(tree, layer)
        return tree


class SharedParameter(nn.Parameter):
    """A parameter over another's memory: ``load_state_dict`` cannot write to it.

    A deep copy is an ordinary parameter with memory of its own.
    """

    def copy_(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ``RuntimeError``."""
        raise RuntimeError("this parameter belongs to the base that is being served")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)


def show_values(tree: nn.Module) -> None:
    """Let the stand-ins of ``tree`` show the values of their weights from now on."""
    for module in tree.modules():
        if isinstance(module, StandIn):
            module.shows_values = True


def _copy_tree(model: nn.Module) -> Any:
    """Copy modules and everything else but tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = SharedParameter(parameter.detach(), requires_grad=False)
        memo.update((id(buffer), buffer) for buffer in module._buffers.values())
    # Layers may hold packed weights in plain attributes, which a deep copy would copy.
    for module in model.modules():
        if not module._modules:
            memo[id(module)] = _twin(module, memo)
    return copy.deepcopy(model, memo)


def _twin(layer: nn.Module, parameters: Mapping[int, nn.Parameter]) -> nn.Module:
    """Return a layer with the attributes of ``layer``, but its own tables of them."""
    twin = layer.__class__.__new__(layer.__class__)
    for name, value in layer.__dict__.items():
        twin.__dict__[name] = copy.copy(value) if isinstance(value, dict | set) else value
    for name, parameter in layer._parameters.items():
        twin._parameters[name] = None if parameter is None else parameters[id(parameter)]
    return twin


def _ordinary(
    layer: PackedLayer, tree: nn.Module, spec: ModuleSpec, dtype: torch.dtype
) -> nn.Module:
    partner = None if spec.tied_to is None else tree.get_submodule(spec.tied_to)
    if isinstance(partner, nn.Embedding) and not isinstance(partner, StandIn):
        # Packed for the server's sake only: the embedding holds the plain weight.
        out_features, in_features = spec.shape
        tied = nn.Linear(in_features, out_features, bias=False, device="meta")
        tied.weight = partner.weight
        if layer.bias is not None:
            tied.bias = nn.Parameter(layer.bias, requires_grad=False)
        return tied.train(layer.training)
    if spec.kind == "embedding":
        return EmbeddingStandIn(layer, dtype).train(layer.training)
    kind = Conv1DStandIn if spec.transposed else LinearStandIn
    stand_in = kind(layer, dtype).train(layer.training)
    if isinstance(partner, StandIn):
        # PEFT takes for tied what shows one parameter; its values are the property's all the same.
        shown = SharedParameter(partner.weight, requires_grad=False)
        stand_in._parameters["weight"] = partner._parameters["weight"] = shown
    return stand_in


def _unpack(tree: nn.Module, written: StandIn) -> None:
    """Put an ordinary layer in place of a stand-in, and of those over the same weight."""
    weight = None
    for name, module in list(tree.named_modules()):
        if not isinstance(module, StandIn):
            continue
        if module is not written and not module.shares_weight(written):
            continue
        ordinary: Any = copy.deepcopy(module)
        weight = ordinary.weight if weight is None else weight
        ordinary.weight = weight
        _put(tree, name, ordinary)


def _make_private(tree: nn.Module, owner: nn.Module, name: str) -> None:
    """Copy parameter ``name`` of ``owner``, for all modules of ``tree`` that share it."""
    shared = owner._parameters[name]
    assert shared is not None
    private = nn.Parameter(shared.detach().clone(), requires_grad=False)
    for module in tree.modules():
        for key, parameter in module._parameters.items():
            if parameter is shared:
                module._parameters[key] = private


def _put(tree: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(tree.get_submodule(parent), child, module)
