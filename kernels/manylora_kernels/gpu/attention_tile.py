"""Online softmax of a tile of queries over a range of one sequence's keys, page by page."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    q_tile: tl.tensor,
    positions: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    k_page: tl.tensor,
    k_token: tl.tensor,
    v_page: tl.tensor,
    v_token: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    capped: tl.constexpr,
    widen: tl.constexpr,
    block_j: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
) -> tl.tensor:
    """Add keys ``[first, last)`` to each row's running maximum, sum and result.

    ``positions``: each row's own, -1 for a row that is none. ``first`` is a multiple of the step.
    """
    d, e, step = tl.arange(0, block_k), tl.arange(0, block_v), tl.arange(0, block_j)
    # The earliest key that any row sees.
    earliest = first
    if window > 0:
        own = tl.where(positions < 0, last, positions)
        earliest = tl.maximum(first, tl.min(own, axis=0) - window + 1)
        earliest = first + (earliest - first) // block_j * block_j
    for start in range(earliest, last, block_j):
        j = start + step
        visible = (j[None, :] <= positions[:, None]) & (j < last)[None, :]
        if window > 0:
            visible = visible & (j[None, :] > positions[:, None] - window)
        # Pages that left a window may be another sequence's by now.
        read = tl.max(visible.to(tl.int32), axis=0) > 0
        page = tl.load(table + j // block_tokens, mask=read, other=0).to(tl.int64)
        offset = j % block_tokens
        key = tl.load(
            k_head + (page * k_page + offset * k_token)[None, :] + d[:, None],
            mask=read[None, :] & (d < key_dim)[:, None],
            other=0.0,
        )
        value = tl.load(
            v_head + (page * v_page + offset * v_token)[:, None] + e[None, :],
            mask=read[:, None] & (e < value_dim)[None, :],
            other=0.0,
        )
        if widen:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(q_tile, key, input_precision="ieee") * scale
        if capped:
            # tanh(z) = 2 sigmoid(2 z) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen no key yet must not compute inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(maximum - base)
        total = total * shrink + tl.sum(weights, axis=1)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(value.dtype), value, result, input_precision="ieee")
        maximum = higher
    return maximum, total, result
