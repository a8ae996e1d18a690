"""The few prompts that every new adapter is tried on, through the server's own route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from manylora_server.model.attention import KVCache
from manylora_server.model.base_view import BaseView
from manylora_server.model.batch import Chunk
from manylora_server.model.loader import LoadedModel
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import SelfTestResult
from manylora_store.compiler.canonical import CompiledAdapter

PROMPTS = 3
# Each prompt comes in these chunks, all in one step: a step stores all keys before any token
# attends. So one pass takes prefill and decode, and gives logits at several positions.
CHUNKS = (5, 1, 1, 1, 3, 1, 1, 3)
TOKENS = sum(CHUNKS)
# The positions whose logits are compared, in each prompt.
POSITIONS = tuple(end - 1 for end in accumulate(CHUNKS))
_BLOCK_TOKENS = 4
_BLOCKS = -(-TOKENS // _BLOCK_TOKENS)
_SLOT = 0
_SEED = 20_240_611


def canary_prompts(vocab_size: int) -> list[list[int]]:
    """Return ``PROMPTS`` prompts of ``TOKENS`` token ids, the same for every adapter."""
    generator = torch.Generator().manual_seed(_SEED)
    ids: list[list[int]] = torch.randint(
        vocab_size, (PROMPTS, TOKENS), generator=generator
    ).tolist()
    return ids


@dataclass(frozen=True, slots=True)
class OwnRoute:
    """The prompts, an adapter and a tree of its own for it, ready for one pass of the model."""

    runner: ModelRunner
    chunks: Sequence[Chunk]

    def logits(self) -> torch.Tensor:
        """Return float32 ``[PROMPTS * len(POSITIONS), vocab]`` on the CPU."""
        return self.runner.logits(self.chunks).cpu()


def own_route(
    view: BaseView,
    loaded: LoadedModel,
    tested: SelfTestResult,
    prompts: Sequence[Sequence[int]],
    adapter: CompiledAdapter | None,
) -> OwnRoute:
    """Install ``adapter`` (``None``: none) on a new tree of ``view``.

    ``OverflowError`` if it holds a value that is not finite in the base's dtype.
    """
    tree: Any = view.tree()
    if adapter is not None:
        modules = AdaptedModules(
            tree, loaded.layout, tested.token_axes, loaded.dtype, loaded.device
        )
        modules.install(_SLOT, adapter)
    # Block 0 belongs to nobody.
    cache = KVCache(
        tested.shapes, 1 + len(prompts) * _BLOCKS, _BLOCK_TOKENS, loaded.dtype, loaded.device
    )
    chunks = [
        Chunk(
            token_ids=prompt[start:end],
            start=start,
            block_table=range(1 + index * _BLOCKS, 1 + (index + 1) * _BLOCKS),
            adapters=() if adapter is None else ((_SLOT, 1.0),),
            sample=True,
        )
        for index, prompt in enumerate(prompts)
        for start, end in pairwise(accumulate(CHUNKS, initial=0))
    ]
    return OwnRoute(ModelRunner(tree, cache, loaded.dtype, loaded.device), chunks)
