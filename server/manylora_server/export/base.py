"""A base as its checkpoint has it: which tensor is which parameter, without loading the model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from manylora_server.core.errors import InvalidRequestError
from manylora_server.export.naming import Naming
from manylora_server.export.sources import (
    PackedTensor,
    Source,
    checkpoint_tensors,
    grouped,
    reading,
)
from manylora_server.model.fingerprint import base_fingerprint
from manylora_server.model.layout import module_specs
from manylora_store.compiler.canonical import BaseLayout
from manylora_store.export.tensor_files import StoredTensor

BaseKind = Literal["dense", "dequantized"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A folder's weights by the name they have there, and by the parameter they are.

    ``sources`` are all tensors; ``keys`` maps a parameter (``module.parameter``) to the tensor
    that is loaded into it as it is, ``converted`` are parameters made of several. ``config`` is
    ``config.json``; ``dtype`` is what most weights have; ``kind`` says whether weights were
    ``dense`` in the checkpoint or had to be unpacked.
    """

    folder: Path
    config: Mapping[str, Any]
    sources: Mapping[str, Source]
    keys: Mapping[str, str]
    converted: frozenset[str]
    naming: Naming
    layout: BaseLayout
    kind: BaseKind
    dtype: torch.dtype


def open_base(folder: Path) -> BaseCheckpoint:
    """Read the headers of the checkpoint in ``folder``.

    Raises:
        InvalidRequestError: it cannot be read, is quantized in another way than bitsandbytes'
            4 bits, or does not hold the parameters of its model.
    """
    config = _read_config(folder)
    naming = Naming(config, folder)
    sources = _sources(folder, naming)
    keys = {}
    converted = set()
    for key in sources:
        parameter, as_it_is = naming.parameter_of(key)
        if not as_it_is:
            converted.add(parameter)
        elif parameter in naming.parameters:
            keys[parameter] = key
    shapes = {parameter: sources[key].form.shape for parameter, key in keys.items()}
    check_parameters(naming, shapes, converted, folder)
    specs = module_specs(naming.model)

    def weight(module: str, parameter: str) -> torch.Tensor:
        spec = specs[module]
        key = keys.get(f"{module}.{parameter}")
        if key is None:
            partners = [m for m, s in specs.items() if m == spec.tied_to or s.tied_to == module]
            key = next(keys[f"{m}.{parameter}"] for m in partners if f"{m}.{parameter}" in keys)
        source = sources[key]
        with reading(source) as rows:
            tensor = rows(0, source.form.shape[0]).float()
        return tensor.T if parameter == "weight" and spec.transposed else tensor

    return BaseCheckpoint(
        folder=folder,
        config=config,
        sources=sources,
        keys=keys,
        converted=frozenset(converted),
        naming=naming,
        layout=BaseLayout(
            model_type=str(config["model_type"]),
            modules=specs,
            weight=weight,
            fingerprint=base_fingerprint(folder),
        ),
        kind=(
            "dequantized"
            if any(isinstance(source, PackedTensor) for source in sources.values())
            else "dense"
        ),
        dtype=_common_dtype(sources.values()),
    )


def check_parameters(
    naming: Naming,
    shapes: Mapping[str, tuple[int, ...]],
    converted: Iterable[str],
    folder: Path,
) -> None:
    """Raise ``InvalidRequestError`` unless a checkpoint with ``shapes`` fills the model.

    ``shapes`` are of parameters stored as they are; ``converted`` are parameters that transformers
    makes of other tensors. One of several tied parameters is enough.
    """
    made = set(converted)
    held = {id(naming.parameters[name]) for name in shapes}
    for name, parameter in naming.parameters.items():
        if name in shapes:
            if shapes[name] != tuple(parameter.shape):
                raise InvalidRequestError(
                    f"MODEL: the tensor for {name!r} in {folder} has shape {list(shapes[name])}; "
                    f"its config.json asks for {list(parameter.shape)}.",
                    param="model",
                )
        elif id(parameter) not in held and name not in made:
            raise InvalidRequestError(
                f"MODEL: the checkpoint in {folder} has no tensor for {name!r} "
                f"{list(parameter.shape)}, which its config.json asks for.",
                param="model",
            )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"MODEL: config.json in {folder} cannot be read: {error}", param="model"
        ) from error
    stored = config.get("quantization_config")
    if stored is not None and not stored.get("load_in_4bit"):
        raise InvalidRequestError(
            f"MODEL: {folder} is quantized by {stored.get('quant_method')!r}, from which nothing "
            "can be exported; give the dense checkpoint, or one that bitsandbytes quantized to 4 "
            "bits.",
            param="model",
        )
    return config


def _sources(folder: Path, naming: Naming) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    stored: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint_tensors(folder).items():
        if isinstance(tensor, StoredTensor):
            stored[name] = tensor
        else:
            sources[name] = tensor
    for name, (tensor, parts) in grouped(stored).items():
        if not parts:
            sources[name] = tensor
            continue
        module, _, _ = naming.parameter_of(name)[0].rpartition(".")
        layer = naming.model.get_submodule(module)
        sources[name] = PackedTensor(tensor, parts, type(layer).__name__ == "Conv1D")
    return sources


def _common_dtype(sources: Iterable[Source]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for source in sources:
        if source.form.dtype in _FLOATS:
            sizes[source.form.dtype] += source.form.bytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32
