"""Our attention, as transformers' models call it, over a paged KV cache of our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from manylora_kernels import paged_attention, store_kv_
from manylora_server.model.context import current_context

# Registered with transformers' AttentionInterface only. As there is no entry of this name in its
# AttentionMaskInterface, models build no mask at all.
IMPLEMENTATION = "manylora"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps for a token."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """The paged keys and values of all layers.

    Per layer ``k [blocks, block_tokens, kv_heads, key_dim]`` and ``v [..., value_dim]``. Block 0
    belongs to nobody and stays zero: block tables are padded with it.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens

        def pages(heads: int, dim: int) -> torch.Tensor:
            cache = torch.empty(num_blocks, block_tokens, heads, dim, dtype=dtype, device=device)
            cache[0].zero_()
            return cache

        self.layers = {
            layer: (
                pages(shape.kv_heads, shape.key_dim),
                pages(shape.kv_heads, shape.value_dim),
            )
            for layer, shape in shapes.items()
        }

    @staticmethod
    def bytes_per_block(
        shapes: Mapping[int, LayerShape], block_tokens: int, dtype: torch.dtype
    ) -> int:
        """Return the memory of one block over all layers, in bytes."""
        per_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes.values())
        return per_token * block_tokens * dtype.itemsize


class ShapeProbe:
    """An attention route that only takes note of each layer's shapes."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Record the layer; return zeros of the right shape."""
        self.shapes[_layer_index(module)] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """The attention route of one step; tensors as in ``manylora_kernels.paged_attention``."""

    cache: KVCache
    positions: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    num_decodes: int

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See ``attend``; the layer is ``module``'s."""
        return self.attend(_layer_index(module), query, key, value, scaling, window, softcap, sinks)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend over each sequence's pages."""
        k_cache, v_cache = self.cache.layers[layer]
        store_kv_(
            k_cache, v_cache, key[0].transpose(0, 1), value[0].transpose(0, 1), self.positions
        )
        out = paged_attention(
            query[0].transpose(0, 1),
            k_cache,
            v_cache,
            self.block_tables,
            self.context_lens,
            self.query_starts,
            self.num_decodes,
            scaling,
            window,
            softcap,
            sinks,
        )
        return out[None]


def _layer_index(module: torch.nn.Module) -> int:
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: send the call to the current step's route."""
    context = current_context()
    assert context is not None, "attention was called outside of a forward context"
    out = context.attention(
        module,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window or 0,
        softcap or 0.0,
        s_aux,
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, attend)
