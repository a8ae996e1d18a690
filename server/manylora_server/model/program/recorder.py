"""Records a forward pass: every operator, module output and attention call, in order.

The pass runs for real, on a few tokens, under a ``TorchDispatchMode``; tensors are told apart by
the memory they lie in. Views need no instruction: a view is another shape over the same buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from manylora_server.model.context import ForwardContext, empty_segments, forward_context

# What reads a tensor's value, or whose result's size depends on values, cannot be replayed.
_DATA_DEPENDENT = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::bincount",
    "aten::is_nonzero",
    "aten::equal",
}


class NotRecordableError(Exception):
    """The forward pass cannot be replayed; the message says why."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor that the pass computes: a strided view of a buffer, offset in elements."""

    buffer: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that is there before the pass, or depends on such ones only."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Event:
    """``kind`` is ``operator``, ``module`` or ``attention``.

    ``target``: the operator, the module's name, or the layer's index. ``args`` may nest; tensors
    in it are ``Ref`` or ``Constant``.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]


@dataclass(slots=True)
class Recording:
    """``buffers``: bytes of each; ``inputs``: the pass's inputs by name; ``output``: the logits."""

    events: list[Event] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)
    inputs: dict[str, Ref] = field(default_factory=dict)
    output: Ref | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._buffers: dict[int, int] = {}
        self._paused = False
        # Memory that is freed could be handed out again and be taken for the same tensor.
        self._alive: list[torch.Tensor] = []

    def input(self, name: str, tensor: torch.Tensor) -> None:
        """Declare an input of the pass."""
        self.recording.inputs[name] = self._define(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and take note of it."""
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name = func._schema.name
        if name in _DATA_DEPENDENT:
            raise NotRecordableError(f"{name} reads what a step computed")
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if _is_tensor(leaf)]
        results = [leaf for leaf in tree_flatten(out)[0] if _is_tensor(leaf)]
        mutates = func._schema.is_mutable
        memory = {_storage(tensor) for tensor in given}
        if not mutates and all(_storage(result) in memory for result in results):
            return out  # views
        if not mutates and given and not any(map(self._computed, given)):
            # Of constants only: computed once, here.
            self._alive.extend(results)
            return out
        if any(result.is_quantized or result.layout is not torch.strided for result in results):
            raise NotRecordableError(f"{name} returns a tensor that is not dense")
        if mutates and not all(map(self._computed, given[:1])):
            raise NotRecordableError(f"{name} writes to what the model owns")
        event_args = tree_map(self._described, args)
        event_kwargs = tree_map(self._described, kwargs)
        outs = tuple(
            self._ref(result) if self._computed(result) else self._define(result)
            for result in results
        )
        self.recording.events.append(Event("operator", func, event_args, event_kwargs, outs))
        return out

    def module(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take note that the module ``name`` turned ``x`` into ``y``: adapters may change it."""
        if not self._computed(y) or not self._computed(x):
            raise NotRecordableError(f"module {name} is fed with constants")
        event = Event("module", name, (self._ref(x),), {}, (self._ref(y),))
        self.recording.events.append(event)

    def attention(
        self, layer: int, tensors: tuple[torch.Tensor, ...], settings: dict[str, Any]
    ) -> torch.Tensor:
        """Take note of an attention call; return a tensor to go on with."""
        query, _, value = tensors
        self._paused = True
        out = torch.zeros(1, query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
        self._paused = False
        args = tuple(self._described(tensor) for tensor in tensors)
        described = {key: self._described(value) for key, value in settings.items()}
        event = Event("attention", layer, args, described, (self._define(out),))
        self.recording.events.append(event)
        return out

    def finish(self, logits: torch.Tensor) -> Recording:
        """Return the recording, of a pass that ended in ``logits``."""
        self.recording.output = self._ref(logits)
        return self.recording

    def _described(self, leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        return self._ref(leaf) if self._computed(leaf) else Constant(leaf)

    def _computed(self, tensor: torch.Tensor) -> bool:
        return tensor.layout is torch.strided and _storage(tensor) in self._buffers

    def _define(self, tensor: torch.Tensor) -> Ref:
        self._alive.append(tensor)
        self._buffers[_storage(tensor)] = len(self.recording.buffers)
        self.recording.buffers.append(tensor.untyped_storage().nbytes())
        return self._ref(tensor)

    def _ref(self, tensor: torch.Tensor) -> Ref:
        return Ref(
            buffer=self._buffers[_storage(tensor)],
            offset=int(tensor.storage_offset()),
            size=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            dtype=tensor.dtype,
        )


class _Route:
    """The attention route of a recorded pass."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Record the call."""
        index = module.layer_idx
        assert isinstance(index, int)
        settings = {"scaling": scaling, "window": window, "softcap": softcap, "sinks": sinks}
        return self._recorder.attention(index, (query, key, value), settings)


def record(
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    modules: Mapping[str, nn.Module],
    tokens: int,
    outputs: int,
) -> Recording:
    """Record ``forward(ids [1, T], positions [1, T], rows [n]) -> logits``.

    ``modules``: those whose outputs adapters may change. Raises ``NotRecordableError``.
    """
    recorder = Recorder()
    ids = torch.arange(tokens)[None] % 2
    positions = torch.arange(tokens)[None]
    rows = torch.arange(outputs)
    for name, tensor in (("ids", ids), ("positions", positions), ("rows", rows)):
        recorder.input(name, tensor)

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            if not args:
                raise NotRecordableError(f"module {name} is called by keyword")
            recorder.module(name, args[0], y)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    empty = empty_segments(tokens)
    context = ForwardContext(_Route(recorder), empty, empty)
    try:
        with torch.no_grad(), forward_context(context), recorder:
            logits = forward(ids, positions, rows)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.finish(logits)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)
