"""The operations, as equations, with their checks. Backends compute them; see ``backends``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import manylora_kernels.library
import manylora_kernels.reference  # noqa: F401 - both register: the operators, their backend
from manylora_kernels.backends import REFERENCE, select_backend, selected_backend
from manylora_kernels.gpu import TRITON
from manylora_kernels.half import DTYPES, PANEL_ROWS, HalfWeight
from manylora_kernels.int8_rows import Int8Weight
from manylora_kernels.native import NATIVE, NATIVE_INT8
from manylora_kernels.nf4 import NF4Weight
from manylora_kernels.reference.int8 import REFERENCE_INT8
from manylora_kernels.segments import RankSegments
from manylora_kernels.tiles import tile

_IN_FLOAT = {NATIVE_INT8: NATIVE, REFERENCE_INT8: REFERENCE}


def nf4_linear(
    x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``y[t] = W x[t] + bias`` for a 4-bit ``W [out, in]``.

    ``x``: ``[T, in]`` of any floating dtype; the result ``[T, out]`` has ``x``'s dtype. Sums are
    at least in ``x``'s precision.
    """
    in_features = weight.shape[1]
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [T, {in_features}], got {tuple(x.shape)}")
    result: torch.Tensor = torch.ops.manylora.nf4_linear(
        x, weight.tensors, weight.form, weight.absmax_offset, bias
    )
    return result


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """Return ``y[t] = W x[t] + bias`` for a float32 ``W`` in oneDNN's own blocked layout.

    ``x [T, in]``, the result ``[T, out]``; ``weight`` as
    ``torch.ops.mkldnn._reorder_linear_weight`` packs ``W [out, in]``, on the CPU.
    """
    result: torch.Tensor = torch.ops.manylora.packed_linear(x, weight, bias, out_features)
    return result


def prepare_nf4(weight: NF4Weight) -> NF4Weight:
    """Return ``weight`` in the layout that the selected backend of ``nf4_linear`` wants.

    Once, at load: it replaces the given one. ``weight`` itself where it is best as it is.
    """
    native = selected_backend("nf4_linear") in (NATIVE, NATIVE_INT8)
    if not native or weight.packed.device.type != "cpu":
        return weight
    return tile(weight) or weight


@contextmanager
def nf4_linear_in_float() -> Iterator[None]:
    """Inside the block, ``nf4_linear`` rounds no activations, whichever backend is selected.

    The selection is the whole process's: no other thread may compute meanwhile.
    """
    selected = selected_backend("nf4_linear")
    select_backend("nf4_linear", _IN_FLOAT.get(selected, selected))
    try:
        yield
    finally:
        select_backend("nf4_linear", selected)


def half_embedding(index: torch.Tensor, weight: HalfWeight) -> torch.Tensor:
    """Return ``y[i] = W[index[i]]`` in float32, ``[n, in]``, for integers ``index [n]``."""
    result: torch.Tensor = torch.ops.manylora.half_embedding(index, weight.tiles, weight.shape[1])
    return result


def half_linear(
    x: torch.Tensor, weight: HalfWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``y[t] = W x[t] + bias`` for a ``W [out, in]`` of bfloat16 or float16.

    ``x``: ``[T, in]`` of any floating dtype; the result ``[T, out]`` has ``x``'s dtype. ``W`` is
    widened and neither ``x`` nor a sum is narrowed: the numbers are those of the product with a
    float32 ``W``, up to the order of summation.
    """
    out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [T, {in_features}], got {tuple(x.shape)}")
    tiles = weight.tiles
    wanted = (-(-out_features // PANEL_ROWS), -(-in_features // 2), 2 * PANEL_ROWS)
    if tiles.shape != wanted or tiles.dtype not in DTYPES:
        raise ValueError(
            f"tiles must be {wanted} of bfloat16 or float16, "
            f"got {tuple(tiles.shape)} of {tiles.dtype}"
        )
    result: torch.Tensor = torch.ops.manylora.half_linear(x, tiles, out_features, bias)
    return result


def int8_linear(
    x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``y[t] = scale * (Q x[t]) + bias`` for a ``W = diag(scale) Q`` in one byte a weight.

    ``x``: ``[T, in]`` of any floating dtype; the result ``[T, out]`` has ``x``'s dtype. Neither
    ``x`` nor a sum is rounded to eight bits.
    """
    out_features, in_features = weight.shape
    if x.dim() != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [T, {in_features}], got {tuple(x.shape)}")
    tiles = weight.tiles
    wanted = (-(-out_features // PANEL_ROWS), -(-in_features // 2), 2, PANEL_ROWS)
    if tiles.shape != wanted or tiles.dtype != torch.int8:
        raise ValueError(f"tiles must be {wanted} of int8, got {tuple(tiles.shape)} {tiles.dtype}")
    result: torch.Tensor = torch.ops.manylora.int8_linear(x, tiles, weight.scale, bias)
    return result


def lora_delta_(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, runs: RankSegments
) -> None:
    """Add each token's own low-rank product to ``y``, in place.

    For every segment ``i`` with tokens ``[t0, t1)``, rank rows ``[r0, r1)`` and weight ``w``::

        y[t] += w * sum over r in [r0, r1) of (x[t] . a[r]) * b[r]        for t in [t0, t1)

    ``y [T, out]``, ``x [T, in]``, ``a [R, in]``, ``b [R, out]``, one floating dtype; on the CPU
    ``a`` and ``b`` may have a narrower one and are widened. Tokens in no segment keep their bits.
    What rows of ``a`` and ``b`` outside a token's own segments hold, NaN included, does not reach
    it.
    """
    if x.shape[0] != y.shape[0] or x.shape[1] != a.shape[1] or y.shape[1] != b.shape[1]:
        raise ValueError(
            f"shapes do not agree: y {tuple(y.shape)}, x {tuple(x.shape)}, "
            f"a {tuple(a.shape)}, b {tuple(b.shape)}"
        )
    ungrouped = (None, None, None, None, 0)
    backend = selected_backend("lora_delta_")
    # Only the reference reads the grouped form, and making it costs as much as a small product.
    grouped = (runs.grouped if backend == REFERENCE else None) or ungrouped
    plan = runs.plan if backend == TRITON else None
    torch.ops.manylora.lora_delta_(y, x, a, b, runs.segments, runs.weights, *grouped, plan)


def scale_shift_(
    y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, segments: torch.Tensor
) -> None:
    """Apply each token's own affine map to ``y``, in place.

    For every segment ``(t0, t1, row, w)``, in order: ``y[t] = scale[row] * y[t] + w * shift[row]``
    for ``t`` in ``[t0, t1)``. ``y [T, out]``, ``scale`` and ``shift`` ``[rows, out]``, ``segments``
    int32 ``[S, 4]`` on any device (``SegmentMap.resolve_rows`` chooses the backend's) with the bits
    of the float32 ``w``; a row of zeros is padding. Tokens in no segment keep their bits.
    """
    if scale.shape != shift.shape or scale.shape[1] != y.shape[1]:
        raise ValueError(
            f"scale and shift must be [rows, {y.shape[1]}], "
            f"got {tuple(scale.shape)} and {tuple(shift.shape)}"
        )
    if segments.dim() != 2 or segments.shape[1] != 4:
        raise ValueError(f"segments must be [S, 4], got {tuple(segments.shape)}")
    torch.ops.manylora.scale_shift_(y, scale, shift, segments)


def store_kv_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write each token's key and value to its place in the paged cache.

    ``k_cache [blocks, block_tokens, heads, dim_k]``, ``v_cache [.., dim_v]``, ``k [T, heads,
    dim_k]``, ``v [T, heads, dim_v]``, ``positions`` int64 ``[T]`` = block * block_tokens + offset.
    Backends for CUDA graphs write nothing for negative positions, which pad a batch there; the
    others need not know them.
    """
    torch.ops.manylora.store_kv_(k_cache, v_cache, k, v, positions)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a flattened batch over a paged cache that already holds its own tokens.

    Sequence ``s`` owns queries ``[query_starts[s], query_starts[s+1])``, which are the last of its
    ``context_lens[s]`` positions. Query at position ``p`` sees keys at positions ``j`` with
    ``p - window < j <= p`` (all ``j <= p`` where ``window`` is 0)::

        z_j = scale * q . k_j;  z_j = softcap * tanh(z_j / softcap) where softcap is not 0
        out = sum_j exp(z_j) v_j / (sum_j exp(z_j) + exp(sink of the head, if any))

    ``q [T, heads, dim_k]``; the cache's ``kv_heads`` divides ``heads`` (grouped queries).
    ``block_tables`` int32 ``[S, max_blocks]``, padded with 0; ``context_lens`` int32 ``[S]``;
    ``query_starts`` int32 ``[S + 1]``. The first ``num_decodes`` sequences have one query each.
    Block 0 is never a sequence's own and must be finite; any other place beyond a sequence's
    context may hold anything. Returns ``[T, heads, dim_v]``.
    """
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{k_cache.shape[2]} kv heads do not divide {q.shape[1]} query heads")
    result: torch.Tensor = torch.ops.manylora.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        query_starts,
        num_decodes,
        scale,
        window,
        softcap,
        sinks,
    )
    return result
