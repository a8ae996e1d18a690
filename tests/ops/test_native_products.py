"""Products fused with their low-rank products in a program: the same bits as one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from manylora_kernels import (
    HalfWeight,
    NF4Weight,
    RankExtent,
    RankSegments,
    Segment,
    SegmentMap,
    half_linear,
    lora_delta_,
    native,
    nf4_linear,
    prepare_nf4,
    select_backend,
)
from manylora_kernels.half import narrow
from support.native import NAN, native_kernels, random, surrounded
from support.nf4 import quantize

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

from manylora_kernels.native.linear import nf4_matrix
from manylora_kernels.native.lora import FACTOR_TYPES
from manylora_kernels.native.program import (
    AffineInt,
    Code,
    HalfMatrix,
    Hook,
    Instruction,
    LoraRuns,
    NativeProgram,
    Operand,
    Place,
    RescaleRuns,
    Step,
)

COLUMNS = 192
# Unequal, so that a run of outputs never ends where another's does; one product has no adapters.
OUTPUTS = [272, 16, 640, 48]
PLAIN = 1
# Rows of one adapter, of none, of several; a prefill of several chunks among decodes; runs of few
# tokens and of many, with rows of the base between.
BATCHES: dict[str, list[tuple[int, int | None]]] = {
    "one": [(1, 0)],
    "base only": [(3, None)],
    "decode": [(1, 0), (1, 1), (1, 2), (2, None), (1, 3)],
    "prefill": [(1, 2), (40, 0), (3, None), (300, 1), (2, 3)],
    "long": [(9, 3), (13, None), (8, 1)],
}


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    with native_kernels(request.param):
        yield request.param


@dataclass(frozen=True)
class Layer:
    """One product and what its adapters add: factors of two types, and a rescaling."""

    weight: NF4Weight | HalfWeight
    bias: torch.Tensor | None
    pools: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor, dict[int, RankExtent]]]
    scale: torch.Tensor
    shift: torch.Tensor


def layer(number: int, half: bool, columns: int = COLUMNS) -> Layer:
    outputs = OUTPUTS[number]
    if half:
        weight: NF4Weight | HalfWeight = narrow(
            random(outputs, columns, seed=number), torch.bfloat16
        )
    else:
        weight = prepare_nf4(quantize((outputs, columns))[0])
    # Adapters 0 to 2 in float32, of ranks on both sides of what is shrunk at once; 3 in 16 bits.
    wide = {0: RankExtent(0, 16, 0.5), 1: RankExtent(16, 3, -1.25), 2: RankExtent(19, 9, 2.0)}
    narrowed = {3: RankExtent(0, 5, 0.75)}
    pools = {}
    for dtype, rows, extents in ((torch.float32, 28, wide), (torch.bfloat16, 5, narrowed)):
        a = surrounded(random(rows, columns, seed=10 + number).to(dtype))
        b = surrounded(random(rows, outputs, seed=20 + number).to(dtype))
        pools[dtype] = (a, b, {} if number == PLAIN else extents)
    bias = random(outputs, seed=30) if number % 2 == 0 else None
    return Layer(weight, bias, pools, random(4, outputs, seed=31), random(4, outputs, seed=32))


def segment_map(batch: list[tuple[int, int | None]]) -> tuple[SegmentMap, int]:
    segments, token = [], 0
    for count, slot in batch:
        if slot is not None:
            segments.append(Segment(token, token + count, slot))
        token += count
    return SegmentMap(segments, token), token


# One row of the rescaling for adapters 0 and 2 only.
RESCALED = {0: 1, 2: 3}


def apart(layers: list[Layer], x: torch.Tensor, rows: SegmentMap) -> list[torch.Tensor]:
    results = []
    for one in layers:
        if isinstance(one.weight, HalfWeight):
            y = half_linear(x, one.weight, one.bias)
        else:
            y = nf4_linear(x, one.weight, one.bias)
        for a, b, extents in one.pools.values():
            runs = rows.resolve(extents) if extents else None
            if runs is not None:
                lora_delta_(y, x, a, b, runs)
        rescaled = rows.resolve_rows(RESCALED)
        # Rounded twice, as the program does; no segment here has a weight.
        for start, end, row, _ in [] if rescaled is None else rescaled.tolist():
            y[start:end] = y[start:end].mul(one.scale[row]).add(one.shift[row])
        results.append(y)
    return results


class Fused:
    """The layers as one program over a shared input."""

    def __init__(
        self, layers: list[Layer], x: torch.Tensor, rows: SegmentMap, *, chained: bool = False
    ) -> None:
        self.kept: list[Any] = [layers]
        self.results = [
            surrounded(torch.full((x.shape[0], one.scale.shape[1]), NAN)) for one in layers
        ]
        self.inputs = [x, *self.results[:-1]] if chained else [x] * len(layers)
        self.hooks = (Hook * len(layers))()
        self.lora: list[RankSegments] = []
        instructions = []
        for number, one in enumerate(layers):
            instructions.append(self._product(one, number))
            # Where torch could have computed an adapter's rows.
            instructions.append(Instruction(code=Code.FOREIGN))
            instructions += [self._hook(code, number) for code in (Code.LORA, Code.RESCALE)]
            self._set_hook(one, number, rows)
        self.runs = (LoraRuns * max(1, len(self.lora)))()
        for entry, runs in zip(self.runs, self.lora, strict=False):
            entry.runs, entry.weights = runs.segments.data_ptr(), runs.weights.data_ptr()
            entry.count = runs.segments.shape[0]
        self.program = NativeProgram(instructions)
        self.count = len(instructions)

    def run(self) -> list[torch.Tensor]:
        step = Step(tokens=self.inputs[0].shape[0], outputs=0)
        step.hooks = ctypes.addressof(self.hooks)
        step.lora = ctypes.addressof(self.runs)
        step.rescale = ctypes.addressof(self.rescale)
        self.program.run(step, 0, self.count)
        return self.results

    def _rows(self, instruction: Instruction, number: int) -> Instruction:
        instruction.size[0] = AffineInt(0, 1, 0)
        for operand, tensor in (("a", self.inputs[number]), ("out", self.results[number])):
            place = Operand(place=Place.ADDRESS, base=tensor.data_ptr())
            place.stride[0] = AffineInt(tensor.shape[1], 0, 0)
            setattr(instruction, operand, place)
        return instruction

    def _product(self, one: Layer, number: int) -> Instruction:
        weight = one.weight
        columns, outputs = self.inputs[number].shape[1], self.results[number].shape[1]
        if isinstance(weight, HalfWeight):
            matrix: Any = HalfMatrix(weight.tiles.data_ptr(), 0, outputs, columns)
            code = Code.HALF_LINEAR
        else:
            tensors, form = weight.tensors, weight.form
            matrix = nf4_matrix(
                form, columns, weight.absmax_offset, *[t.data_ptr() for t in tensors]
            )
            self.kept.append(tensors)
            code = Code.NF4_LINEAR
        self.kept.append(matrix)
        result = self._rows(Instruction(code=code, dims=1), number)
        result.weight = ctypes.addressof(matrix)
        if one.bias is not None:
            result.bias = one.bias.data_ptr()
        return result

    def _hook(self, code: Code, number: int) -> Instruction:
        result = self._rows(Instruction(code=code, dims=1, hook=number), number)
        result.size[1] = AffineInt(self.inputs[number].shape[1], 0, 0)
        result.size[2] = AffineInt(self.results[number].shape[1], 0, 0)
        return result

    def _set_hook(self, one: Layer, number: int, rows: SegmentMap) -> None:
        hook = self.hooks[number]
        for pool in hook.pools:
            pool.runs = -1
        for dtype, (a, b, extents) in one.pools.items():
            runs = rows.resolve(extents) if extents else None
            if runs is not None:
                pool = hook.pools[FACTOR_TYPES.index(dtype)]
                pool.a, pool.b, pool.runs = a.data_ptr(), b.data_ptr(), len(self.lora)
                self.lora.append(runs)
        rescaled = rows.resolve_rows(RESCALED)
        self.rescale = (RescaleRuns * 1)()
        hook.rescale = -1
        if rescaled is not None:
            self.kept.append(rescaled)
            hook.scale, hook.shift, hook.rescale = one.scale.data_ptr(), one.shift.data_ptr(), 0
            self.rescale[0].runs = rescaled.data_ptr()
            self.rescale[0].count = rescaled.shape[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["float", "int8", "half"])
@pytest.mark.parametrize("batch", BATCHES)
def test_fused_products_give_the_bits_of_separate_ones(
    isa: str, batch: str, kind: str, threads: int
) -> None:
    if kind == "int8":
        select_backend("nf4_linear", "native-int8")
    layers = [layer(number, kind == "half") for number in range(len(OUTPUTS))]
    rows, tokens = segment_map(BATCHES[batch])
    x = random(tokens, COLUMNS, seed=tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = apart(layers, x, rows)
        for got, wanted in zip(Fused(layers, x, rows).run(), expected, strict=True):
            assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(before)


def test_a_product_over_another_s_outputs_waits_for_them(isa: str) -> None:
    """The second reads what the first wrote, rescaling included, so they are not joined."""
    rows, tokens = segment_map(BATCHES["prefill"])
    x = random(tokens, COLUMNS, seed=5)
    first, second = layer(0, half=False), layer(3, half=False, columns=OUTPUTS[0])
    (between,) = apart([first], x, rows)
    (expected,) = apart([second], between, rows)
    assert torch.equal(Fused([first, second], x, rows, chained=True).run()[1], expected)
