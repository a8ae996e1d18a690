"""The one algebra every adapter is compiled to (DESIGN section 4).

For a linear module with base weight ``W [out, in]`` and bias ``b``, an adapter's rows are::

    y = g * (W x + b + scaling * B A x) + shift

and for an embedding, where ``x`` is a token id::

    y = g * (e W[x] + scaling * A[:, x] B) + shift

where ``e`` is the module's own output multiplier (Gemma's scaled embeddings; 1 elsewhere). PEFT
multiplies the delta by ``e`` too, so the compiler folds it into ``scaling``: what is added to the
unmodified module's output is always ``scaling * A[:, x] B``.

``g`` and ``shift`` are absent (1 and 0) for most adapters. DoRA's magnitude gives ``g``; a bias of
the adapter's own, which PEFT adds outside of ``g``, is folded into ``shift`` with the base's ``b``.
That is all there is for a norm whose bias was trained: ``y = norm(x) + shift``.
A module whose weights the adapter replaces outright (``modules_to_save``, embeddings saved with the
adapter) carries ``replacement``: all of the module's own
parameters, by name, in the shapes of ``ModuleSpec.parameters``. It stands in for ``W`` and ``b``
above (``e`` still applies); deltas go on top of it.

What an adapter adds to its base, ``scaling * B A x`` and ``shift``, can be weighted, and several
adapters' can be summed. ``g`` and ``replacement`` can not: an adapter with one of these is used
alone and at full weight (``nonlinear_parts``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from manylora_store.records import AdapterRecord

ModuleKind = Literal["linear", "embedding", "norm", "other"]


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module of the loaded base, as an adapter may address it.

    ``shape`` is ``(out_features, in_features)`` for linear modules (GPT-2's ``Conv1D`` included,
    already transposed to that order) and ``(num_embeddings, embedding_dim)`` for embeddings, else
    empty. ``parameters`` maps the module's own parameter names to their shapes as the *checkpoint*
    stores them (for ``Conv1D``: ``weight`` is ``(in, out)``). ``transposed`` is true for
    ``Conv1D``. ``tied_to`` names the module that shares this one's weight, if any.
    ``output_multiplier`` is what an embedding multiplies its rows by (``embed_scale``).
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, ...]
    parameters: Mapping[str, tuple[int, ...]]
    transposed: bool = False
    is_output_head: bool = False
    tied_to: str | None = None
    output_multiplier: float = 1.0


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """The loaded base as the compiler sees it.

    ``modules`` are in the model's own order. ``weight(name, parameter)`` returns the base's
    parameter in float32 on the CPU, dequantized if need be, ``[out, in]`` for linear modules
    (``Conv1D`` included); it is called only where an adapter needs it (DoRA, biases, ties).
    """

    model_type: str
    modules: Mapping[str, ModuleSpec]
    weight: Callable[[str, str], torch.Tensor]
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class LowRank:
    """``scaling * B A``: ``a [r, in]`` (``[r, vocab]`` for embeddings), ``b [r, out]``.

    ``b`` is stored rank-major (the transpose of PEFT's ``lora_B.weight``) so that a rank's row is
    contiguous in both factors.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of rows of ``a``."""
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class ModulePatch:
    """What one adapter does to one module; see the module docstring for the equation."""

    low_rank: LowRank | None = None
    output_scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    replacement: Mapping[str, torch.Tensor] | None = None


_LINEAR_PARTS = frozenset({"low_rank", "shift"})


def nonlinear_parts(patch: ModulePatch) -> tuple[str, ...]:
    """Return the names of ``patch``'s parts that a weighted sum of adapters cannot contain."""
    return tuple(
        part.name
        for part in fields(patch)
        if part.name not in _LINEAR_PARTS and getattr(patch, part.name) is not None
    )


@dataclass(frozen=True, slots=True)
class CompiledAdapter:
    """An adapter ready to be put into a slot: immutable, tensors on the CPU in float32."""

    record: AdapterRecord
    patches: Mapping[str, ModulePatch] = field(default_factory=dict)
