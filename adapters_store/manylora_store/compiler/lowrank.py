"""The adapter proper of one module: PEFT's factors as a ``LowRank`` and an output scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from manylora_store.compiler.canonical import LowRank, ModuleSpec
from manylora_store.compiler.targets import Target
from manylora_store.errors import AdapterInvalidError

ROWS_AT_ONCE = 1024
"""Rows of ``W + scaling * B A`` held at a time, so that a large embedding fits in memory."""


@dataclass(frozen=True, slots=True)
class Factors:
    """PEFT's tensors of one module in canonical orientation: ``a [r, in]``, ``b [r, out]``.

    For embeddings ``in`` is the vocabulary. ``bias`` is that of ``lora_B``, ``magnitude`` DoRA's.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def read_factors(slots: Mapping[str, torch.Tensor]) -> Factors:
    """Bring the tensors of one module (by slot name) into canonical orientation.

    LoRA ``y += s * B (A x)``; AdaLoRA ``y += s * B ((A * E) x)``, so ``E`` is folded into ``a``;
    embeddings ``y += s * A[:, x]^T B^T`` with ``A [r, vocab]`` and ``B [width, r]``.
    """
    if "lora_E" in slots:
        return Factors(
            a=slots["lora_A"] * slots["lora_E"],
            b=slots["lora_B"].T.contiguous(),
        )
    embedding = "lora_embedding_A" in slots
    return Factors(
        a=slots["lora_embedding_A" if embedding else "lora_A.weight"],
        b=slots["lora_embedding_B" if embedding else "lora_B.weight"].T.contiguous(),
        bias=slots.get("lora_B.bias"),
        magnitude=slots.get("lora_magnitude_vector"),
    )


def share_embedding_factors(
    slots: Mapping[str, torch.Tensor], embedding: Mapping[str, torch.Tensor], head: str
) -> dict[str, torch.Tensor]:
    """Return the tensors of an output head that shares its factors with an embedding.

    PEFT ties them as ``lora_A = embedding_B^T`` and ``lora_B = embedding_A^T``.

    Raises:
        AdapterInvalidError: the file also holds factors of the head, and they differ.
    """
    tied = {
        "lora_A.weight": embedding["lora_embedding_B"].T.contiguous(),
        "lora_B.weight": embedding["lora_embedding_A"].T.contiguous(),
    }
    for slot, tensor in tied.items():
        if slot in slots and not torch.equal(slots[slot], tensor):
            raise AdapterInvalidError(
                f"ensure_weight_tying is set, but {slot} of module {head!r} differs from the"
                " embedding's factor it is tied to"
            )
    return {**slots, **tied}


def low_rank(factors: Factors, target: Target, spec: ModuleSpec) -> LowRank | None:
    """Return the module's low-rank part, or ``None`` if no rank is left (AdaLoRA)."""
    if target.rank == 0:
        return None
    return LowRank(factors.a, factors.b, target.scaling * spec.output_multiplier)


def dora_scale(
    factors: Factors, target: Target, spec: ModuleSpec, weight: torch.Tensor
) -> torch.Tensor | None:
    """Return DoRA's ``g = magnitude / ||W + scaling * B A||``, or ``None`` without a magnitude.

    The norm is L2 over the inputs of each output: rows of a linear ``W [out, in]``, columns of an
    embedding's ``W [vocab, width]``. PEFT takes it before an embedding's output multiplier.

    Raises:
        AdapterInvalidError: an output's norm is zero, so the scale is not finite.
    """
    if factors.magnitude is None:
        return None
    rows = weight.T if spec.kind == "embedding" else weight
    norms = torch.cat(
        [
            torch.linalg.norm(
                rows[start : start + ROWS_AT_ONCE]
                + target.scaling * (factors.b[:, start : start + ROWS_AT_ONCE].T @ factors.a),
                dim=1,
            )
            for start in range(0, rows.shape[0], ROWS_AT_ONCE)
        ]
    )
    scale = factors.magnitude / norms
    bad = int((~torch.isfinite(scale)).sum())
    if bad:
        raise AdapterInvalidError(
            f"DoRA on module {spec.name!r}: {bad} of {scale.numel()} outputs have a zero weight"
            " norm, so magnitude / norm is not finite"
        )
    return scale
