"""A recorded pass with some of its modules exchanged: what a merged twin runs.

The pass is the base's own; only the instructions that compute an exchanged module are others. So a
twin needs no recording of its own, which would hold up the steps meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from manylora_server.model.half_linear import HalfLinear
from manylora_server.model.int8_linear import Int8Linear
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear
from manylora_server.model.program.affine import Affine
from manylora_server.model.program.operands import ONE, NotNativeError, rows_of
from manylora_server.model.program.recorder import Constant
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRef

_PRODUCTS = {
    torch.ops.manylora.nf4_linear.default,
    torch.ops.manylora.half_linear.default,
    torch.ops.manylora.packed_linear.default,
}


def producer_of(events: Sequence[SymbolicEvent], index: int) -> int | None:
    """Return the place of the one operator that computes the module event at ``index``.

    ``None`` where the module is more than a product of what it is given.
    """
    (x,), (y,) = events[index].args, events[index].outs
    before = events[index - 1] if index else None
    if before is None or before.kind != "operator" or before.target not in _PRODUCTS:
        return None
    given = before.args[0]
    same = isinstance(given, SymbolicRef) and given.buffer == x.buffer
    return index - 1 if same and before.outs[0].buffer == y.buffer else None


def product(module: nn.Module, event: SymbolicEvent) -> SymbolicEvent | None:
    """Return the operator by which ``module`` computes its ``event``, ``None`` if by several."""
    (x,), (y,) = event.args, event.outs
    try:
        given, out = _matrix(x), _matrix(y)
    except NotNativeError:
        return None
    shift = getattr(module, "bias", None)
    bias = Constant(shift) if isinstance(shift, torch.Tensor) else None
    args: tuple[Any, ...]
    if isinstance(module, NF4Linear):
        weight = module.weight_nf4
        tensors = [Constant(tensor) for tensor in weight.tensors]
        args = (given, tensors, list(weight.form), weight.absmax_offset, bias)
        return _operator(torch.ops.manylora.nf4_linear.default, args, out)
    if isinstance(module, HalfLinear):
        half = module.weight_half
        args = (given, Constant(half.tiles), half.shape[0], bias)
        return _operator(torch.ops.manylora.half_linear.default, args, out)
    if isinstance(module, Int8Linear):
        eight = module.weight_int8
        args = (given, Constant(eight.tiles), Constant(eight.scale), bias)
        return _operator(torch.ops.manylora.int8_linear.default, args, out)
    if isinstance(module, PackedLinear):
        args = (given, Constant(module.weight), bias, module.out_features)
        return _operator(torch.ops.manylora.packed_linear.default, args, out)
    return None


def call(module: nn.Module, event: SymbolicEvent) -> SymbolicEvent:
    """Return the event of torch calling ``module``, whatever it is."""
    return SymbolicEvent("operator", module, event.args, {}, event.outs)


def exchanged(
    events: Sequence[SymbolicEvent], modules: Mapping[str, nn.Module]
) -> dict[int, SymbolicEvent]:
    """Return what takes the place of which event so that ``modules`` compute their outputs.

    ``KeyError`` names a module that the pass does not call.
    """
    result: dict[int, SymbolicEvent] = {}
    missing = set(modules)
    for index, event in enumerate(events):
        if event.kind != "module" or event.target not in modules:
            continue
        missing.discard(event.target)
        module = modules[event.target]
        producer = producer_of(events, index)
        own = None if producer is None else product(module, event)
        if producer is not None and own is not None:
            result[producer] = own
        else:
            # On top of what the base's module computed, which nobody has read yet.
            result[index] = call(module, event)
    if missing:
        raise KeyError(", ".join(sorted(missing)))
    return result


def _operator(target: object, args: tuple[object, ...], out: SymbolicRef) -> SymbolicEvent:
    return SymbolicEvent("operator", target, args, {}, (out,))


def _matrix(ref: SymbolicRef) -> SymbolicRef:
    """Return ``ref``, whose rows are one dense matrix, with two dimensions."""
    rows, width = rows_of(ref)
    size = (rows, Affine(width))
    return SymbolicRef(ref.buffer, ref.offset, size, (Affine(width), ONE), ref.dtype)
