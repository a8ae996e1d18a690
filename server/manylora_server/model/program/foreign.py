"""Operators of a recording that torch computes, on the program's memory, between native runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from manylora_server.model.program.affine import Affine
from manylora_server.model.program.recorder import Constant
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRef

# A tensor of the program for one step's size.
View = Callable[[SymbolicRef], torch.Tensor]


@dataclass(frozen=True, slots=True)
class BoundCall:
    """An operator with its arguments for one step's size; ``outs`` are where results belong."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[torch.Tensor, ...]

    def __call__(self) -> None:
        """Compute, and copy the results to their places."""
        result = self.target(*self.args, **self.kwargs)
        results: Sequence[Any] = [result] if isinstance(result, torch.Tensor) else result
        for out, tensor in zip(self.outs, results, strict=True):
            if tensor.data_ptr() != out.data_ptr():
                out.copy_(tensor)


def bind_call(event: SymbolicEvent, tokens: int, outputs: int, view: View) -> BoundCall:
    """Return the call of an operator event for a step's size."""

    def value(leaf: Any) -> Any:
        if isinstance(leaf, SymbolicRef):
            return view(leaf)
        if isinstance(leaf, Constant):
            return leaf.tensor
        if isinstance(leaf, Affine):
            return leaf.at(tokens, outputs)
        return leaf

    return BoundCall(
        target=event.target,
        args=tree_map(value, event.args),
        kwargs=tree_map(value, event.kwargs),
        outs=tuple(map(view, event.outs)),
    )
