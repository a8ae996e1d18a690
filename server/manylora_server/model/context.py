"""What the model's modules must know of the step that is running.

transformers calls our attention and our modules deep inside its own forward, so the step's data
reaches them through one thread-local context. Contexts cannot be nested.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from manylora_kernels import SegmentMap


class AttentionRoute(Protocol):
    """Computes attention for one layer; see ``attention.PagedAttention``."""

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
        """Return ``[1, T, heads, dim_v]``; the tensors given are ``[1, heads, T, dim]``."""


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One forward pass over a flattened batch.

    ``segments`` covers all ``T`` rows of the batch; ``output_segments`` the rows that the output
    head sees (only those whose logits are wanted).
    """

    attention: AttentionRoute
    segments: SegmentMap
    output_segments: SegmentMap


class _Local(threading.local):
    current: ForwardContext | None = None


_local = _Local()


def current_context() -> ForwardContext | None:
    """Return the context of the forward pass that this thread is in, if it is in one."""
    return _local.current


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make ``context`` the current one for the ``with`` block."""
    assert _local.current is None, "forward contexts cannot be nested"
    _local.current = context
    try:
        yield
    finally:
        _local.current = None


def empty_segments(num_tokens: int, **kwargs: Any) -> SegmentMap:
    """Return a map in which every row belongs to the base."""
    return SegmentMap((), num_tokens, **kwargs)
