"""Paged attention in plain PyTorch: decode rows as one padded batch, prefill one by one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from manylora_kernels.backends import REFERENCE, register


@register("store_kv_", REFERENCE)
def store_kv_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See ``ops.store_kv_``."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, positions, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, positions, v)


@register("paged_attention", REFERENCE)
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See ``ops.paged_attention``."""
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
    lengths = context_lens.tolist()
    for rows in _buckets(lengths[:num_decodes]):
        index: slice | torch.Tensor
        if len(rows) == num_decodes:
            index = slice(0, num_decodes)
        else:
            index = torch.tensor(rows, device=q.device)
        longest = max(lengths[row] for row in rows)
        out[index] = _decode(
            q[index],
            k_cache,
            v_cache,
            block_tables[index],
            context_lens[index],
            longest,
            scale,
            window,
            softcap,
            sinks,
        )
    starts = query_starts.tolist()
    for row in range(num_decodes, len(lengths)):
        start, end, length = starts[row], starts[row + 1], lengths[row]
        blocks = block_tables[row, : -(-length // k_cache.shape[1])]
        k = k_cache[blocks].flatten(0, 1)[:length]
        v = v_cache[blocks].flatten(0, 1)[:length]
        out[start:end] = _prefill(q[start:end], k, v, scale, window, softcap, sinks)
    return out


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Group rows so that padding to a group's longest at most doubles the keys that are read."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    groups: list[list[int]] = []
    for row in order:
        if groups and lengths[row] <= 2 * lengths[groups[-1][0]] + 64:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query a sequence: ``q [B, heads, dim]`` over keys padded to ``longest``."""
    batch, heads, dim = q.shape
    block_tokens, kv_heads = k_cache.shape[1:3]
    tables = block_tables[:, : -(-longest // block_tokens)]
    keys, values = _gather(k_cache, v_cache, tables, context_lens)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    positions = torch.arange(k.shape[2], device=q.device)
    ends = context_lens[:, None]
    visible = positions < ends
    if window:
        visible &= positions >= ends - window
    grouped = q.view(batch, kv_heads, heads // kv_heads, dim)
    grouped_sinks = None if sinks is None else sinks.view(1, kv_heads, heads // kv_heads, 1)
    out = _attend(grouped, k, v, visible[:, None, None], scale, softcap, grouped_sinks)
    return out.reshape(batch, heads, -1)


def _gather(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    context_lens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each sequence's pages as ``[B, keys, kv_heads, dim]``, finite beyond its context.

    Block 0, which is finite, stands in for blocks beyond a sequence's last: those in its table
    that it has not reached may hold what an earlier owner left there, like its last one's end.
    """
    block_tokens = k_cache.shape[1]
    last = torch.div(context_lens - 1, block_tokens, rounding_mode="floor")
    ahead = torch.arange(tables.shape[1], device=tables.device) > last[:, None]
    blocks = tables.masked_fill(ahead, 0).flatten()
    rows = torch.arange(tables.shape[0], device=tables.device)
    offsets = torch.arange(block_tokens, device=tables.device)
    stale = (last[:, None] * block_tokens + offsets >= context_lens[:, None])[:, :, None, None]
    found = []
    for cache in (k_cache, v_cache):
        pages = cache.index_select(0, blocks).view(*tables.shape, *cache.shape[1:])
        pages[rows, last] = pages[rows, last].masked_fill_(stale, 0.0)
        found.append(pages.flatten(1, 2))
    return found[0], found[1]


def _prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence: the last ``len(q)`` of its ``len(k)`` positions; ``q [n, heads, dim]``."""
    count, heads, dim = q.shape
    length, kv_heads = k.shape[:2]
    groups = heads // kv_heads
    grouped = q.view(count, kv_heads, groups, dim).permute(1, 2, 0, 3)
    keys = k.transpose(0, 1)[:, None].expand(kv_heads, groups, length, dim)
    values = v.transpose(0, 1)[:, None].expand(kv_heads, groups, length, v.shape[2])
    query_positions = torch.arange(length - count, length, device=q.device)[:, None]
    key_positions = torch.arange(length, device=q.device)
    visible = key_positions <= query_positions
    if window:
        visible &= key_positions > query_positions - window
    grouped_sinks = None if sinks is None else sinks.view(kv_heads, groups, 1, 1)
    out = _attend(grouped, keys, values, visible, scale, softcap, grouped_sinks)
    return out.permute(2, 0, 1, 3).reshape(count, heads, -1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax attention of 4-d ``q``, ``k``, ``v`` under the boolean mask ``visible``."""
    if softcap == 0.0 and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return weights.to(v.dtype) @ v
