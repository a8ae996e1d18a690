"""Several adapters as one, by the methods of PEFT's ``LoraModel.add_weighted_adapter``.

What each method makes of members ``i`` with weights ``w_i`` in one module::

    cat                       sum_i w_i s_i B_i A_i, exactly, at the sum of the ranks
    svd                       the same sum, cut to its largest singular values
    linear                    B A with A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i and
                              B = sum_i sqrt|w_i s_i| B_i
    magnitude_prune, ties,    as linear, on factors of which only a share ``density`` is kept: the
    dare_linear, dare_ties    largest values, or random ones (scaled up); in ties the majority of
                              signs decides at each place (arXiv:2306.01708, arXiv:2311.03099)

A member that does not touch a module takes no part in it. One member alone is scaled exactly,
whatever the method, as in PEFT; only ``svd`` with a rank cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    disjoint_merge,
    magnitude_based_pruning,
    reshape_weight_task_tensors,
    task_arithmetic,
)

from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter, LowRank, ModulePatch
from manylora_store.errors import AdapterUnsupportedError, CombinationError
from manylora_store.export.methods import SAME_RANK, Recipe, check_weight


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a combination."""

    name: str
    adapter: CompiledAdapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Combination:
    """``patches`` of the members together.

    ``svd_error`` is the Frobenius norm of what ``svd`` left out, of all modules together and
    relative to that of the exact sum; ``None`` for other methods.
    """

    patches: Mapping[str, ModulePatch]
    svd_error: float | None = None


def combine(members: Sequence[Member], recipe: Recipe, layout: BaseLayout) -> Combination:
    """Combine ``members``; one of weight 1 alone keeps all that it does.

    Random methods draw from a generator of their own: the same ``recipe`` gives the same result.

    Raises:
        AdapterUnsupportedError: a member does more to the base than a low-rank product, so it can
            be neither scaled nor combined.
        CombinationError: no members, a weight that is not finite, or a method that needs equal
            ranks of members that have different ones.
    """
    if not members:
        raise CombinationError("adapters: none came; name one or more", "adapters")
    for member in members:
        check_weight(member.name, member.weight)
    cuts = recipe.method == "svd" and (len(members) > 1 or recipe.rank is not None)
    if len(members) == 1 and members[0].weight == 1 and not cuts:
        return Combination(members[0].adapter.patches)
    factors = [_factors(member, layout) for member in members]
    if len(members) == 1 and not cuts:
        recipe = replace(recipe, method="cat")
    combiner = _Combiner(members, recipe)
    patches = {}
    for name, spec in layout.modules.items():
        present = [
            (member, own[name]) for member, own in zip(members, factors, strict=True) if name in own
        ]
        if present:
            low = combiner.module(name, present)
            if low.rank:
                low = replace(low, scaling=low.scaling * spec.output_multiplier)
                patches[name] = ModulePatch(low_rank=low)
    return Combination(patches, combiner.svd_error)


def more_than_low_rank(name: str, patch: ModulePatch) -> str | None:
    """Say what a patch of module ``name`` does besides adding a low-rank product, if anything."""
    if patch.replacement is not None:
        return f"it brings parameters of its own for module {name!r} (modules_to_save, biases)"
    if patch.output_scale is not None:
        return f"on module {name!r} it has a DoRA magnitude, which depends on the base's weights"
    if patch.shift is not None:
        return f"it brings a bias for module {name!r}"
    return None


def _factors(member: Member, layout: BaseLayout) -> dict[str, LowRank]:
    """Return the member's products as PEFT scales them, that is without output multipliers."""
    found = {}
    for name, patch in member.adapter.patches.items():
        reason = more_than_low_rank(name, patch)
        if reason is not None:
            raise AdapterUnsupportedError(
                f"adapters: {member.name!r} can only be taken alone and with weight 1: {reason}"
            )
        low = patch.low_rank
        if low is not None:
            multiplier = layout.modules[name].output_multiplier
            found[name] = replace(low, scaling=low.scaling / multiplier)
    return found


class _Combiner:
    """Combines one module after the other, in the order of the model, as PEFT does."""

    def __init__(self, members: Sequence[Member], recipe: Recipe) -> None:
        self._recipe = recipe
        self._rank = recipe.rank or max(member.adapter.record.rank for member in members)
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._left_out = self._whole = 0.0

    @property
    def svd_error(self) -> float | None:
        if self._recipe.method != "svd":
            return None
        return math.sqrt(self._left_out / self._whole) if self._whole else 0.0

    def module(self, name: str, present: Sequence[tuple[Member, LowRank]]) -> LowRank:
        if self._recipe.method in SAME_RANK:
            _check_ranks(name, present, self._recipe.method)
            return self._from_factors(present)
        exact = _concatenated(present)
        return self._cut(exact) if self._recipe.method == "svd" else exact

    def _cut(self, exact: LowRank) -> LowRank:
        """Cut to the largest singular values, found from the factors: no dense product."""
        # In float64: neighbouring singular values at the cut amplify rounding.
        left, upper = torch.linalg.qr(exact.b.T.double())
        right, lower = torch.linalg.qr(exact.a.T.double())
        u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        self._whole += float(s.square().sum())
        self._left_out += float(s[self._rank :].square().sum())
        keep = min(self._rank, len(s))
        return LowRank(
            a=(v[:keep] @ right.T).float().contiguous(),
            b=((u[:, :keep] * s[:keep]).T @ left.T).float().contiguous(),
            scaling=1.0,
        )

    def _from_factors(self, present: Sequence[tuple[Member, LowRank]]) -> LowRank:
        scalings = [member.weight * low.scaling for member, low in present]
        roots = [math.sqrt(abs(scaling)) for scaling in scalings]
        signed = [math.copysign(root, s) for root, s in zip(roots, scalings, strict=True)]
        # In PEFT's shapes and order, so that random draws and ties of magnitudes are the same.
        a = self._merged([low.a for _, low in present], torch.tensor(signed))
        b = self._merged([low.b.T.contiguous() for _, low in present], torch.tensor(roots))
        return LowRank(a, b.T.contiguous(), 1.0)

    def _merged(self, tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        method, density = self._recipe.method, self._recipe.kept
        if method == "linear":
            kept = tensors
        elif method in ("dare_linear", "dare_ties"):
            kept = [self._drop_random(tensor, density) for tensor in tensors]
        else:
            kept = [
                magnitude_based_pruning(tensor, density) if density < 1 else tensor
                for tensor in tensors
            ]
        merged: torch.Tensor
        if method in ("ties", "dare_ties"):
            stacked = torch.stack(kept)
            majority = calculate_majority_sign_mask(stacked)
            weighted = stacked * reshape_weight_task_tensors(stacked, weights)
            merged = disjoint_merge(weighted, majority)
        else:
            merged = task_arithmetic(kept, weights)
        return merged

    def _drop_random(self, tensor: torch.Tensor, density: float) -> torch.Tensor:
        """As PEFT's ``random_pruning``, which draws from the generator of the whole process."""
        if density >= 1:
            return tensor
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=self._generator)
        return tensor * kept / density


def _concatenated(present: Sequence[tuple[Member, LowRank]]) -> LowRank:
    """Return ``sum_i w_i s_i B_i A_i``, with weights and scalings in ``a``."""
    return LowRank(
        a=torch.cat([low.a * (member.weight * low.scaling) for member, low in present]),
        b=torch.cat([low.b for _, low in present]),
        scaling=1.0,
    )


def _check_ranks(name: str, present: Sequence[tuple[Member, LowRank]], method: str) -> None:
    ranks = {member.name: low.rank for member, low in present}
    if len(set(ranks.values())) > 1:
        shown = ", ".join(f"{member} has {rank}" for member, rank in ranks.items())
        raise CombinationError(
            f"method: {method} needs adapters of equal ranks, but on module {name!r} {shown};"
            " method cat takes any ranks, svd cuts their sum to one",
            "method",
        )
