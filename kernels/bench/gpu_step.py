"""One decode step of an 8B-shaped Llama with random weights, from the kernels alone.

32 layers of 4096, 32 heads over 8 key heads of 128, 14336 wide, vocabulary 128,256; rotary
positions are left out. Sequences have one context length; each may have an adapter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from gpu_weights import random_nf4

from manylora_kernels import (
    NF4Weight,
    RankExtent,
    RankSegments,
    Segment,
    SegmentMap,
    lora_delta_,
    nf4_linear,
    paged_attention,
    store_kv_,
)

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """What the model looks like."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    vocabulary: int = 128256

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of a layer's linear modules."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
            "gate": (self.inner, self.hidden),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


@dataclass
class Model:
    """Weights, pools of adapters and pages of ``requests`` sequences."""

    shape: Shape
    requests: int
    context: int
    rank: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    weights: list[dict[str, NF4Weight]] = field(default_factory=list)
    pools: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape, pages = self.shape, -(-self.context // BLOCK_TOKENS)
        for _ in range(shape.layers):
            self.weights.append(
                {name: random_nf4(size, self.device) for name, size in shape.linears.items()}
            )
            self.pools.append(
                {
                    name: (
                        self._random(self.requests * self.rank, columns) / columns**0.5,
                        self._random(self.requests * self.rank, rows) / self.rank**0.5,
                    )
                    for name, (rows, columns) in shape.linears.items()
                }
            )
        self.head = self._random(shape.vocabulary, shape.hidden) / shape.hidden**0.5
        self.x = self._random(self.requests, shape.hidden)
        size = (1 + self.requests * pages, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        self.caches = [(self._random(*size), self._random(*size)) for _ in range(shape.layers)]
        tables = torch.arange(self.requests * pages, device=self.device, dtype=torch.int32) + 1
        self.tables = tables.view(self.requests, pages)
        self.lengths = torch.full_like(self.tables[:, 0], self.context)
        self.starts = torch.arange(self.requests + 1, device=self.device, dtype=torch.int32)
        last = self.tables[:, -1].long() * BLOCK_TOKENS
        self.places = last + (self.context - 1) % BLOCK_TOKENS

    def runs(self) -> RankSegments:
        """Return the step's segments: each request its own adapter."""
        slots = range(self.requests)
        segments = [Segment(slot, slot + 1, slot) for slot in slots]
        extents = {slot: RankExtent(slot * self.rank, self.rank, 0.5) for slot in slots}
        map_ = SegmentMap(segments, self.requests, device=self.device, dtype=self.dtype)
        runs = map_.resolve(extents)
        assert runs is not None
        return runs

    def bytes(self, adapters: bool) -> int:
        """Return what a step must read: weights, head and pages once, adapters once."""
        total = sum(weight.bytes for layer in self.weights for weight in layer.values())
        total += self.head.numel() * self.head.element_size()
        shape = self.shape
        row = 2 * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        total += shape.layers * self.requests * self.context * row
        if adapters:
            total += sum(
                pool.numel() * pool.element_size()
                for layer in self.pools
                for pair in layer.values()
                for pool in pair
            )
        return total

    def step(self, runs: RankSegments | None) -> torch.Tensor:
        """Return the logits of all requests."""
        x, shape = self.x, self.shape
        for layer, (k_cache, v_cache) in enumerate(self.caches):
            normed = F.rms_norm(x, x.shape[-1:])
            q, k, v = (self._linear(layer, name, normed, runs) for name in "qkv")
            keys, values = (t.view(-1, shape.kv_heads, shape.head_dim) for t in (k, v))
            store_kv_(k_cache, v_cache, keys, values, self.places)
            attended = paged_attention(
                q.view(-1, shape.heads, shape.head_dim),
                k_cache,
                v_cache,
                self.tables,
                self.lengths,
                self.starts,
                self.requests,
                shape.head_dim**-0.5,
            )
            x = x + self._linear(layer, "o", attended.flatten(1), runs)
            normed = F.rms_norm(x, x.shape[-1:])
            gate = self._linear(layer, "gate", normed, runs)
            inner = F.silu(gate) * self._linear(layer, "up", normed, runs)
            x = x + self._linear(layer, "down", inner, runs)
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.head)

    def _linear(
        self, layer: int, name: str, x: torch.Tensor, runs: RankSegments | None
    ) -> torch.Tensor:
        y = nf4_linear(x, self.weights[layer][name])
        if runs is not None:
            lora_delta_(y, x, *self.pools[layer][name], runs)
        return y

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)
