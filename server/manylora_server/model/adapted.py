"""Modules that add, to each row of a batch, what that row's adapter does to the base module.

Each wraps the base's module and computes the equation of ``manylora_store.compiler.canonical``.
A module is wrapped when the first adapter touches it; modules that no adapter touches run as
transformers wrote them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from manylora_kernels import SegmentMap, lora_delta_
from manylora_server.model.context import current_context
from manylora_server.model.half_linear import HalfEmbedding
from manylora_server.model.host_copy import NARROW_DTYPES
from manylora_server.model.rank_pool import AffinePool, RankPool
from manylora_store.compiler.canonical import LowRank, ModulePatch, ModuleSpec


class AdaptedModule(nn.Module):
    """Base of the wrappers: keeps the patches of the resident adapters by slot.

    ``base`` is the wrapped module; ``token_axis`` the axis of its input and output that counts the
    batch's tokens (some models normalise ``[1, heads, T, dim]``). Subclasses compute the rows of
    one step in ``patch_rows``.
    """

    def __init__(
        self,
        base: nn.Module,
        spec: ModuleSpec,
        dtype: torch.dtype,
        device: torch.device,
        token_axis: int = 1,
    ) -> None:
        super().__init__()
        self.base = base
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.token_axis = token_axis
        self.replacements: dict[int, dict[str, torch.Tensor]] = {}
        self.slots: set[int] = set()

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code of transformers that looks at its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def reserve(self, slot: int, patch: ModulePatch) -> None:
        """Make room for ``patch`` as ``slot``'s. May move memory that other slots' rows are in."""
        assert slot not in self.slots, "the slot must be removed first"
        self.slots.add(slot)
        if patch.replacement is not None:
            self.replacements[slot] = {
                name: torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
                for name, tensor in patch.replacement.items()
            }
        self._reserve(slot, patch)

    def fill(self, slot: int, patch: ModulePatch) -> None:
        """Copy ``patch`` to where ``reserve`` made room; rows of ``slot`` may be computed then."""
        if patch.replacement is not None:
            for name, tensor in patch.replacement.items():
                self.replacements[slot][name].copy_(tensor, non_blocking=True)
        self._fill(slot, patch)

    def remove(self, slot: int) -> None:
        """Forget ``slot``'s patch and give its memory back."""
        self.slots.discard(slot)
        self.replacements.pop(slot, None)
        self._remove(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the base's output with every row's patch applied."""
        y: torch.Tensor = self.base(x)
        if not self.slots:
            return y
        context = current_context()
        if context is None:
            return y
        segments = context.output_segments if self.spec.is_output_head else context.segments
        if not segments.segments:
            return y
        return self.patch_rows(x, y, segments)

    def _reserve(self, slot: int, patch: ModulePatch) -> None:
        """Make room for all of ``patch`` but its replacement."""
        raise NotImplementedError

    def _fill(self, slot: int, patch: ModulePatch) -> None:
        """Copy what ``_reserve`` made room for."""
        raise NotImplementedError

    def _remove(self, slot: int) -> None:
        """Forget what ``_reserve`` made room for."""
        raise NotImplementedError

    def patch_rows(self, x: torch.Tensor, y: torch.Tensor, segments: SegmentMap) -> torch.Tensor:
        """Return ``y``, the base's output for ``x``, with the patches of ``segments`` applied.

        In place as far as it can be.
        """
        for start, end, slot, _ in segments.segments:
            parameters = self.replacements.get(slot)
            if parameters is not None:
                rows = x.narrow(self.token_axis, start, end - start)
                replaced = self._with_parameters(parameters, rows)
                y.narrow(self.token_axis, start, end - start).copy_(replaced)
        return y

    def _with_parameters(
        self, parameters: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        """Return what the base would for ``rows`` if it had these parameters."""
        result: torch.Tensor = functional_call(self.base, parameters, (rows,))
        return result


class AdaptedLinear(AdaptedModule):
    """``y = g * (W x + b + s B A x) + shift`` per row, for ``nn.Linear``, ``Conv1D`` and 4-bit."""

    def __init__(
        self,
        base: nn.Module,
        spec: ModuleSpec,
        dtype: torch.dtype,
        device: torch.device,
        token_axis: int = 1,
    ) -> None:
        super().__init__(base, spec, dtype, device, token_axis)
        out_features, in_features = spec.shape
        self.ranks = RankPool(in_features, out_features, dtype, device)
        # Factors that came in 16 bits, where the module computes in float32, by their dtype.
        self.narrow_ranks: dict[torch.dtype, RankPool] = {}
        self.affine = AffinePool(out_features, dtype, device)

    def _reserve(self, slot: int, patch: ModulePatch) -> None:
        if patch.low_rank is not None:
            self._pool_for(patch.low_rank).reserve(slot, patch.low_rank)
        if _is_affine(patch):
            self.affine.reserve(slot)

    def _fill(self, slot: int, patch: ModulePatch) -> None:
        if patch.low_rank is not None:
            self._pool_for(patch.low_rank).fill(slot, patch.low_rank)
        if _is_affine(patch):
            self.affine.fill(slot, patch.output_scale, patch.shift)

    def _remove(self, slot: int) -> None:
        for pool in self.rank_pools:
            pool.remove(slot)
        self.affine.remove(slot)

    def patch_rows(self, x: torch.Tensor, y: torch.Tensor, segments: SegmentMap) -> torch.Tensor:
        """See ``AdaptedModule.patch_rows``."""
        out_features, in_features = self.spec.shape
        rows = x.reshape(-1, in_features)
        result = y.view(-1, out_features)
        if self.replacements:
            self._replace(rows, result, segments)
        for pool in self.rank_pools:
            runs = segments.resolve(pool.extents) if pool.extents else None
            if runs is not None:
                lora_delta_(result, rows, pool.a, pool.b, runs)
        self.affine.apply(result, segments)
        return y

    @property
    def rank_pools(self) -> tuple[RankPool, ...]:
        """The pools of low-rank factors, in one order whichever came first: sums depend on it."""
        narrow = (self.narrow_ranks.get(dtype) for dtype in NARROW_DTYPES)
        return (self.ranks, *(pool for pool in narrow if pool is not None))

    def _pool_for(self, factors: LowRank) -> RankPool:
        dtype = factors.a.dtype
        if self.dtype is not torch.float32 or dtype not in NARROW_DTYPES:
            return self.ranks
        pool = self.narrow_ranks.get(dtype)
        if pool is None:
            out_features, in_features = self.spec.shape
            pool = RankPool(in_features, out_features, dtype, self.device)
            self.narrow_ranks[dtype] = pool
        return pool

    def _replace(self, rows: torch.Tensor, result: torch.Tensor, segments: SegmentMap) -> None:
        bias = getattr(self.base, "bias", None)
        for start, end, slot, _ in segments.segments:
            parameters = self.replacements.get(slot)
            if parameters is None:
                continue
            weight = parameters["weight"]
            if self.spec.transposed:
                weight = weight.t()
            own_bias = parameters.get("bias", bias)
            result[start:end] = F.linear(rows[start:end], weight, own_bias)


class AdaptedNorm(AdaptedModule):
    """``y = norm(x) + shift`` per row, or the norm with parameters of the adapter's own."""

    def __init__(
        self,
        base: nn.Module,
        spec: ModuleSpec,
        dtype: torch.dtype,
        device: torch.device,
        token_axis: int = 1,
    ) -> None:
        super().__init__(base, spec, dtype, device, token_axis)
        self.shifts: dict[int, torch.Tensor] = {}

    def _reserve(self, slot: int, patch: ModulePatch) -> None:
        assert patch.low_rank is None
        assert patch.output_scale is None
        if patch.shift is not None:
            self.shifts[slot] = torch.empty(patch.shift.shape, dtype=self.dtype, device=self.device)

    def _fill(self, slot: int, patch: ModulePatch) -> None:
        if patch.shift is not None:
            self.shifts[slot].copy_(patch.shift, non_blocking=True)

    def _remove(self, slot: int) -> None:
        self.shifts.pop(slot, None)

    def patch_rows(self, x: torch.Tensor, y: torch.Tensor, segments: SegmentMap) -> torch.Tensor:
        """See ``AdaptedModule.patch_rows``."""
        y = super().patch_rows(x, y, segments)
        for start, end, slot, weight in segments.segments:
            shift = self.shifts.get(slot)
            if shift is not None:
                y.narrow(self.token_axis, start, end - start).add_(shift, alpha=weight)
        return y


class AdaptedEmbedding(AdaptedModule):
    """``y = g * (W[x] + s A[:, x] B) + shift`` per row, for token embeddings."""

    def __init__(
        self,
        base: nn.Module,
        spec: ModuleSpec,
        dtype: torch.dtype,
        device: torch.device,
        token_axis: int = 1,
    ) -> None:
        super().__init__(base, spec, dtype, device, token_axis)
        self.low_rank: dict[int, LowRank] = {}
        self.affine = AffinePool(spec.shape[1], dtype, device)

    def _reserve(self, slot: int, patch: ModulePatch) -> None:
        factors = patch.low_rank
        if factors is not None:
            # Kept token-major, [vocab, r], so that a token's row is contiguous.
            self.low_rank[slot] = LowRank(
                a=torch.empty(factors.a.shape[::-1], dtype=self.dtype, device=self.device),
                b=torch.empty(factors.b.shape, dtype=self.dtype, device=self.device),
                scaling=factors.scaling,
            )
        if _is_affine(patch):
            self.affine.reserve(slot)

    def _fill(self, slot: int, patch: ModulePatch) -> None:
        factors = patch.low_rank
        if factors is not None:
            room = self.low_rank[slot]
            room.a.copy_(factors.a.t(), non_blocking=True)
            room.b.copy_(factors.b, non_blocking=True)
        if _is_affine(patch):
            self.affine.fill(slot, patch.output_scale, patch.shift)

    def _remove(self, slot: int) -> None:
        self.low_rank.pop(slot, None)
        self.affine.remove(slot)

    def patch_rows(self, x: torch.Tensor, y: torch.Tensor, segments: SegmentMap) -> torch.Tensor:
        """See ``AdaptedModule.patch_rows``."""
        y = super().patch_rows(x, y, segments)
        ids = x.reshape(-1)
        result = y.view(-1, self.spec.shape[1])
        for start, end, slot, weight in segments.segments:
            factors = self.low_rank.get(slot)
            if factors is not None:
                projected = F.embedding(ids[start:end], factors.a)
                result[start:end].addmm_(projected, factors.b, alpha=factors.scaling * weight)
        self.affine.apply(result, segments)
        return y

    def _with_parameters(
        self, parameters: dict[str, torch.Tensor], rows: torch.Tensor
    ) -> torch.Tensor:
        if isinstance(self.base, HalfEmbedding):  # which has no parameter to call it with
            return F.embedding(rows, parameters["weight"])
        return super()._with_parameters(parameters, rows)


def _is_affine(patch: ModulePatch) -> bool:
    return patch.output_scale is not None or patch.shift is not None
