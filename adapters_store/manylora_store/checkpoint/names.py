"""Tensor names of PEFT files. Imports neither torch nor peft.

PEFT writes ``base_model.model.<module>.<slot>`` and, on load, also accepts the name of the adapter
it loads into, ``default``, behind the slot.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from manylora_store.errors import AdapterIncompatibleError, AdapterUnsupportedError

PREFIX = "base_model.model."

Origin = Literal["factor", "base_layer", "own", "copy"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_WRAPPED = re.compile(
    r"(?P<module>.+?)\.(?P<wrapper>base_layer|original_module|modules_to_save(?:\.default)?)"
    r"\.(?P<slot>[^.]+)"
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor's name, taken apart.

    ``origin`` says what kind of tensor it is: ``factor`` (part of the adapter proper), ``own`` (a
    parameter of the module, by its plain name), ``base_layer`` (the same, by the name it has below
    a LoRA layer) or ``copy`` (what PEFT saves a second time for a module in ``modules_to_save``).
    ``slot`` is the parameter's name below the module, without the adapter's name.
    """

    key: str
    module: str
    slot: str
    origin: Origin


def parse_name(key: str, modules: Container[str]) -> TensorName:
    """Take apart the tensor name ``key``, given the names of the base's modules.

    Raises:
        AdapterIncompatibleError: the tensor is for a module the base does not have.
        AdapterUnsupportedError: the name follows no known pattern.
    """
    if not key.startswith(PREFIX):
        raise AdapterUnsupportedError(
            f"tensor {key!r} is not understood: its name does not begin with {PREFIX!r}"
        )
    name = _split(key, key.removeprefix(PREFIX))
    if name.module in modules:
        return name
    ancestor = name.module
    while "." in ancestor:
        ancestor = ancestor.rpartition(".")[0]
        if ancestor in modules:
            raise AdapterUnsupportedError(
                f"tensor {key!r} is not understood: module {ancestor!r} of the base has no part"
                f" {key.removeprefix(PREFIX + ancestor + '.')!r} that a LoRA adapter adds"
            )
    raise AdapterIncompatibleError(
        f"tensor {key!r} is for module {name.module!r}, which the base does not have"
    )


def _split(key: str, name: str) -> TensorName:
    factor = _FACTOR.fullmatch(name)
    if factor:
        slot = factor["slot"] + (factor["leaf"] or "")
        if slot == "lora_magnitude_vector.weight":
            slot = "lora_magnitude_vector"
        return TensorName(key, factor["module"], slot, "factor")
    wrapped = _WRAPPED.fullmatch(name)
    if wrapped:
        origin: Origin = "base_layer" if wrapped["wrapper"] == "base_layer" else "copy"
        return TensorName(key, wrapped["module"], wrapped["slot"], origin)
    module, _, slot = name.rpartition(".")
    return TensorName(key, module or name, slot, "own")
