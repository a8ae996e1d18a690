"""Which native instruction computes what torch's operators compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from manylora_kernels.half import DTYPES
from manylora_kernels.native.half import INT8_KIND
from manylora_kernels.native.linear import nf4_matrix
from manylora_kernels.native.program import (
    AttentionLayer,
    Binary,
    Code,
    HalfMatrix,
    Instruction,
    Operand,
    Place,
    Unary,
)
from manylora_kernels.nf4 import Form
from manylora_kernels.tiles import PANEL_ROWS
from manylora_server.model.program.affine import Affine
from manylora_server.model.program.arena import ArenaPlan
from manylora_server.model.program.operands import (
    NotNativeError,
    affine,
    operand,
    rows_of,
    shape_of,
)
from manylora_server.model.program.recorder import Constant
from manylora_server.model.program.symbolic import SymbolicEvent, SymbolicRef

_aten = torch.ops.aten

_UNARY = {
    _aten.neg.default: Unary.NEGATE,
    _aten.rsqrt.default: Unary.INVERSE_ROOT,
    _aten.sigmoid.default: Unary.SIGMOID,
    _aten.silu.default: Unary.SILU,
    _aten.tanh.default: Unary.TANH,
    _aten.relu.default: Unary.RELU,
    _aten.exp.default: Unary.EXPONENTIAL,
    _aten.clone.default: Unary.COPY,
}
_BINARY = {
    _aten.add.Tensor: Binary.ADD,
    _aten.add_.Tensor: Binary.ADD,
    _aten.sub.Tensor: Binary.SUBTRACT,
    _aten.mul.Tensor: Binary.MULTIPLY,
    _aten.mul_.Tensor: Binary.MULTIPLY,
    _aten.div.Tensor: Binary.DIVIDE,
}


class Lowering:
    """Turns events into instructions; keeps alive what these point to."""

    def __init__(self, plan: ArenaPlan) -> None:
        self._plan = plan
        self.kept: list[Any] = []

    def instructions(self, event: SymbolicEvent) -> list[Instruction]:
        """Return the instructions for an operator; ``NotNativeError`` where there are none."""
        target = event.target
        if target in _UNARY:
            return [self._unary(_UNARY[target], event.args[0], event.outs[0])]
        if target in _BINARY:
            return [self._binary(_BINARY[target], event)]
        rule = _RULES.get(target)
        if rule is None:
            raise NotNativeError
        return rule(self, event)

    def rows(self, code: Code, hook: int, x: SymbolicRef, y: SymbolicRef) -> Instruction:
        """Return the instruction of an adapter's ``hook`` on ``y``, computed from ``x``."""
        count, width = rows_of(x)
        same, outputs = rows_of(y)
        if count != same:
            raise NotNativeError
        result = self._matrices(code, count, x, y)
        result.hook = hook
        result.size[1], result.size[2] = affine(Affine(width)), affine(Affine(outputs))
        return result

    def _matrices(self, code: Code, rows: Affine, x: SymbolicRef, y: SymbolicRef) -> Instruction:
        result = Instruction()
        result.code, result.dims = code, 1
        result.size[0] = affine(rows)
        result.a, result.out = operand(x, self._plan), operand(y, self._plan)
        # One stride each: that between rows.
        result.a.stride[0] = affine(x.size[-1])
        result.out.stride[0] = affine(y.size[-1])
        return result

    def _elements(self, code: Code, function: int, out: SymbolicRef) -> Instruction:
        result = Instruction()
        result.code, result.function, result.dims = code, function, len(out.size)
        result.out = operand(out, self._plan)
        for index, size in enumerate(out.size):
            result.size[index] = affine(size)
        return result

    def _unary(self, function: Unary, a: Any, out: SymbolicRef) -> Instruction:
        result = self._elements(Code.UNARY, function, out)
        result.a = operand(_tensor(a), self._plan, out.size)
        return result

    def _binary(self, function: Binary, event: SymbolicEvent) -> Instruction:
        out = event.outs[0]
        result = self._elements(Code.BINARY, function, out)
        result.scalar = float(event.kwargs.get("alpha", 1))
        a, b = event.args
        result.a = operand(_tensor(a), self._plan, out.size)
        if isinstance(b, int | float) and not isinstance(b, bool):
            result.scalar *= float(b)
            result.b = Operand(place=Place.SCALAR)
        else:
            result.b = operand(_tensor(b), self._plan, out.size)
        return result

    def _power(self, event: SymbolicEvent) -> list[Instruction]:
        if event.args[1] != 2:
            raise NotNativeError
        return [self._unary(Unary.SQUARE, event.args[0], event.outs[0])]

    def _gelu(self, event: SymbolicEvent) -> list[Instruction]:
        if event.kwargs.get("approximate") != "tanh":
            raise NotNativeError
        return [self._unary(Unary.GELU_TANH, event.args[0], event.outs[0])]

    def _copy(self, event: SymbolicEvent) -> list[Instruction]:
        return [self._unary(Unary.COPY, event.args[1], event.outs[0])]

    def _mean(self, event: SymbolicEvent) -> list[Instruction]:
        a, dims, *keep = event.args
        source, out = _tensor(a), event.outs[0]
        size = shape_of(source)
        last = len(size) - 1
        if dims not in ([-1], [last]) or keep != [True] or event.kwargs.get("dtype") is not None:
            raise NotNativeError
        if not isinstance(source, SymbolicRef) or source.stride[-1] != Affine(1):
            raise NotNativeError
        result = self._elements(Code.MEAN, 0, out)
        result.a = operand(source, self._plan)
        result.dims = last
        result.size[last] = affine(size[-1])
        return [result]

    def _concatenate(self, event: SymbolicEvent) -> list[Instruction]:
        parts = event.args[0]
        out = event.outs[0]
        axis = event.args[1] if len(event.args) > 1 else 0
        axis %= len(out.size)
        result = []
        before = 0
        for part in parts:
            source = _tensor(part)
            size = shape_of(source)
            if not size[axis].is_constant or not out.stride[axis].is_constant:
                raise NotNativeError
            shift = before * out.stride[axis].constant
            offset = Affine(
                out.offset.constant + shift, out.offset.per_token, out.offset.per_output
            )
            place = SymbolicRef(out.buffer, offset, size, out.stride, out.dtype)
            result.append(self._unary(Unary.COPY, source, place))
            before += size[axis].constant
        return result

    def _nf4_linear(self, event: SymbolicEvent) -> list[Instruction]:
        x, weight, form, absmax_offset, bias = event.args
        whole = Form(*form)
        out = event.outs[0]
        # The kernel writes whole panels of rows.
        if not whole.tiled or whole.out_features % PANEL_ROWS or not isinstance(x, SymbolicRef):
            raise NotNativeError
        rows, columns = rows_of(x)
        tensors = [constant.tensor for constant in weight]
        matrix = nf4_matrix(whole, columns, absmax_offset, *[t.data_ptr() for t in tensors])
        result = self._matrices(Code.NF4_LINEAR, rows, x, out)
        result.weight = ctypes.addressof(matrix)
        self.kept.extend((tensors, matrix))
        self._set_bias(result, bias)
        return [result]

    def _half_linear(self, event: SymbolicEvent) -> list[Instruction]:
        x, tiles, out_features, bias = event.args
        kind = DTYPES.index(tiles.tensor.dtype)
        return self._tiled_linear(event, x, tiles, kind, None, out_features, bias)

    def _int8_linear(self, event: SymbolicEvent) -> list[Instruction]:
        x, tiles, scale, bias = event.args
        if not scale.tensor.is_contiguous():
            raise NotNativeError
        out_features = scale.tensor.shape[0]
        return self._tiled_linear(event, x, tiles, INT8_KIND, scale.tensor, out_features, bias)

    def _tiled_linear(
        self,
        event: SymbolicEvent,
        x: Any,
        tiles: Constant,
        kind: int,
        scale: torch.Tensor | None,
        out_features: int,
        bias: Constant | None,
    ) -> list[Instruction]:
        if not isinstance(x, SymbolicRef) or not tiles.tensor.is_contiguous():
            raise NotNativeError
        rows, columns = rows_of(x)
        address = None if scale is None else scale.data_ptr()
        matrix = HalfMatrix(tiles.tensor.data_ptr(), kind, out_features, columns, address)
        result = self._matrices(Code.HALF_LINEAR, rows, x, event.outs[0])
        result.weight = ctypes.addressof(matrix)
        self.kept.extend((tiles.tensor, scale, matrix))
        self._set_bias(result, bias)
        return [result]

    def _set_bias(self, instruction: Instruction, bias: Constant | None) -> None:
        if bias is None:
            return
        if bias.tensor.dtype is not torch.float32 or not bias.tensor.is_contiguous():
            raise NotNativeError
        instruction.bias = bias.tensor.data_ptr()
        self.kept.append(bias.tensor)

    def attention(self, event: SymbolicEvent, number: int) -> Instruction:
        """Return the instruction for an attention call, the ``number``th of the pass.

        Raises ``NotNativeError`` where a size is not the same in every step.
        """
        query, key, value = event.args
        out, settings = event.outs[0], event.kwargs
        for tensor in (query, key, value):
            if not isinstance(tensor, SymbolicRef) or tensor.stride[3] != Affine(1):
                raise NotNativeError
        sizes = (query.size[1], key.size[1], key.size[3], value.size[3])
        if not all(size.is_constant for size in sizes):
            raise NotNativeError
        heads, kv_heads, key_dim, value_dim = (size.constant for size in sizes)
        if out.stride[1:] != (Affine(heads * value_dim), Affine(value_dim), Affine(1)):
            raise NotNativeError
        sinks = settings["sinks"]
        if sinks is not None:
            sinks = sinks.tensor.detach().float().contiguous()
        layer = AttentionLayer(
            number,
            heads,
            kv_heads,
            key_dim,
            value_dim,
            settings["window"],
            None if sinks is None else sinks.data_ptr(),
            settings["scaling"],
            settings["softcap"],
        )
        result = Instruction(code=Code.ATTENTION, weight=ctypes.addressof(layer))
        result.out = operand(out, self._plan)
        for name, tensor in (("a", query), ("b", key), ("c", value)):
            place = operand(tensor, self._plan)
            # The strides between heads and between tokens.
            place.stride[0], place.stride[1] = affine(tensor.stride[1]), affine(tensor.stride[2])
            setattr(result, name, place)
        self.kept.extend((layer, sinks))
        return result


_RULES: dict[Any, Callable[[Lowering, SymbolicEvent], list[Instruction]]] = {
    _aten.pow.Tensor_Scalar: Lowering._power,
    _aten.gelu.default: Lowering._gelu,
    _aten.copy_.default: Lowering._copy,
    _aten.mean.dim: Lowering._mean,
    _aten.cat.default: Lowering._concatenate,
    torch.ops.manylora.nf4_linear.default: Lowering._nf4_linear,
    torch.ops.manylora.half_linear.default: Lowering._half_linear,
    torch.ops.manylora.int8_linear.default: Lowering._int8_linear,
}


def _tensor(value: Any) -> SymbolicRef | Constant:
    if not isinstance(value, SymbolicRef | Constant):
        raise NotNativeError
    return value
