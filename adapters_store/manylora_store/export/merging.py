"""What an adapter makes of a module's own parameters.

With the algebra of ``compiler.canonical``, a linear module's merged parameters are::

    W' = diag(g) (W + scaling * B A)        b' = g * b + shift

and an embedding's, whose rows the module itself multiplies by ``e``::

    W'[x] = g * (W[x] + (scaling / e) * A[:, x] B)

``replacement``, where there is one, stands for ``W`` and ``b``. Weights are computed a few rows at
a time, so that no more of them need be in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from manylora_store.compiler.canonical import ModulePatch, ModuleSpec
from manylora_store.errors import AdapterUnsupportedError


def changes(patch: ModulePatch, parameter: str) -> bool:
    """Whether ``patch`` makes another parameter of the module's own ``parameter``."""
    if patch.replacement is not None and parameter in patch.replacement:
        return True
    if parameter == "weight":
        return patch.low_rank is not None or patch.output_scale is not None
    return parameter == "bias" and (patch.shift is not None or patch.output_scale is not None)


def check_mergeable(spec: ModuleSpec, patch: ModulePatch) -> None:
    """Raise ``AdapterUnsupportedError`` for what no weights of the module could express."""
    if spec.kind == "embedding" and patch.shift is not None:
        raise AdapterUnsupportedError(
            f"module {spec.name!r}: the adapter adds a bias to an embedding, which has none"
        )


def merged_rows(
    spec: ModuleSpec,
    patch: ModulePatch,
    base_rows: Callable[[int, int], torch.Tensor],
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return rows ``start`` to ``stop`` of the merged weight, float32, as the checkpoint has them.

    ``base_rows(start, stop)`` gives those of the base's weight: ``[out, in]`` for linear modules,
    ``[in, out]`` for ``Conv1D``, ``[vocab, width]`` for embeddings. It is not called where the
    adapter brings the weight itself.
    """
    if patch.replacement is not None:
        rows = patch.replacement["weight"][start:stop].float().clone()
    else:
        rows = base_rows(start, stop).float()
    low, scale = patch.low_rank, patch.output_scale
    by_row = spec.kind == "linear" and not spec.transposed
    if low is not None:
        # Rows of the stored weight are outputs, or else inputs (tokens, for an embedding).
        left, right = (low.b, low.a) if by_row else (low.a, low.b)
        scaling = low.scaling / spec.output_multiplier
        rows.addmm_(left[:, start:stop].float().T, right.float(), alpha=scaling)
    if scale is not None:
        rows *= scale[start:stop, None] if by_row else scale[None, :]
    return rows


def merged_bias(patch: ModulePatch, base: torch.Tensor | None) -> torch.Tensor:
    """Return the merged bias in float32; ``base`` is ``None`` where the module has none."""
    bias = (patch.replacement or {}).get("bias", base)
    parts = []
    if bias is not None:
        parts.append(bias.float() if patch.output_scale is None else patch.output_scale * bias)
    if patch.shift is not None:
        parts.append(patch.shift.float())
    assert parts, "neither the base nor the adapter has a bias here"
    return parts[0].clone() if len(parts) == 1 else parts[0] + parts[1]
