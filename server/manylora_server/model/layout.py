"""The loaded base described as the adapter compiler sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from manylora_server.model.half_linear import HalfModule
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear
from manylora_store.compiler.canonical import BaseLayout, ModuleKind, ModuleSpec


def module_specs(model: Any) -> dict[str, ModuleSpec]:
    """Describe the modules of ``model`` as loaded, before any is packed or wrapped."""
    head = model.get_output_embeddings()
    owners: dict[int, str] = {}
    modules: dict[str, ModuleSpec] = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, NF4Linear):
            shapes: dict[str, tuple[int, ...]] = {"weight": module.weight_nf4.shape}
            if module.bias is not None:
                shapes["bias"] = tuple(module.bias.shape)
        elif parameters:
            shapes = {key: tuple(value.shape) for key, value in parameters.items()}
        else:
            continue
        weight = parameters.get("weight")
        tied_to = None
        if weight is not None:
            owner = owners.setdefault(id(weight), name)
            tied_to = owner if owner != name else None
        modules[name] = ModuleSpec(
            name=name,
            kind=_kind(module),
            shape=_shape(module),
            parameters=shapes,
            transposed=isinstance(module, Conv1D),
            is_output_head=module is head,
            tied_to=tied_to,
            output_multiplier=_embed_scale(module),
        )
    return modules


def describe(
    model: Any, specs: Mapping[str, ModuleSpec], model_type: str, fingerprint: str
) -> BaseLayout:
    """Return the layout of ``model`` with ``specs``, before any module is wrapped."""
    originals = {name: model.get_submodule(name) for name in specs}
    # The tensors and not the modules: while a step computes an adapter's rows, a module's own
    # parameters are swapped for the adapter's, and another thread may be compiling meanwhile.
    parameters = {
        name: {key: value.detach() for key, value in module.named_parameters(recurse=False)}
        for name, module in originals.items()
    }

    def weight_of(name: str, parameter: str) -> torch.Tensor:
        module = originals[name]
        if isinstance(module, NF4Linear) and parameter == "weight":
            return module.weight_nf4.dequantize().cpu()
        if isinstance(module, PackedLinear | HalfModule) and parameter == "weight":
            return module.dense_weight()
        tensor: torch.Tensor | None = parameters[name].get(parameter)
        if tensor is None:
            # Packed layers keep a bias as a plain attribute, which nothing swaps.
            tensor = getattr(module, parameter).detach()
        if parameter == "weight" and isinstance(module, Conv1D):
            tensor = tensor.t()
        return tensor.float().cpu()

    return BaseLayout(
        model_type=model_type, modules=specs, weight=weight_of, fingerprint=fingerprint
    )


def _kind(module: nn.Module) -> ModuleKind:
    if isinstance(module, nn.Linear | Conv1D | NF4Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "Norm" in type(module).__name__:
        return "norm"
    return "other"


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, NF4Linear):
        return module.weight_nf4.shape
    if isinstance(module, nn.Linear | nn.Embedding):
        return tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        return (module.nf, module.nx)
    return ()


def _embed_scale(module: nn.Module) -> float:
    """Return what the embedding's own forward multiplies its rows by (Gemma 3)."""
    scale = getattr(module, "embed_scale", None)
    if not isinstance(module, nn.Embedding) or scale is None:
        return 1.0
    if isinstance(scale, torch.Tensor) and scale.is_meta:
        # A model without memory, which has only what the buffer would be filled with.
        scale = torch.tensor(module.scalar_embed_scale)
    return float(scale)
