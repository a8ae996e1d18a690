"""Element by element instructions of native programs, on every instruction set, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from manylora_kernels import native
from support.native import native_kernels, random, surrounded

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

from manylora_kernels.native.program import (
    AffineInt,
    Binary,
    Code,
    Instruction,
    NativeProgram,
    Operand,
    Place,
    Step,
    Unary,
)

UNARY: dict[Unary, Callable[[torch.Tensor], torch.Tensor]] = {
    Unary.COPY: lambda x: x.clone(),
    Unary.NEGATE: torch.neg,
    Unary.SQUARE: torch.square,
    Unary.INVERSE_ROOT: torch.rsqrt,
    Unary.SIGMOID: torch.sigmoid,
    Unary.SILU: torch.nn.functional.silu,
    Unary.TANH: torch.tanh,
    Unary.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Unary.RELU: torch.relu,
    Unary.EXPONENTIAL: torch.exp,
}
BINARY: dict[Binary, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    Binary.ADD: torch.add,
    Binary.SUBTRACT: torch.sub,
    Binary.MULTIPLY: torch.mul,
    Binary.DIVIDE: torch.div,
}
SIZES = [1, 3, 15, 16, 17, 33, 130]


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native_kernels(request.param):
        yield request.param


def constant(value: int) -> AffineInt:
    return AffineInt(value, 0, 0)


def operand(tensor: torch.Tensor) -> Operand:
    result = Operand(place=Place.ADDRESS, base=tensor.data_ptr())
    for index, stride in enumerate(tensor.stride()):
        result.stride[index] = constant(stride)
    return result


def execute(
    code: Code,
    function: int,
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor | float | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Run one instruction; ``a`` and ``b`` must have the shape of ``out`` (``expand`` them)."""
    instruction = Instruction(code=code, function=function, dims=out.dim(), scalar=alpha)
    for index, size in enumerate(out.shape):
        instruction.size[index] = constant(size)
    instruction.out, instruction.a = operand(out), operand(a)
    if isinstance(b, torch.Tensor):
        instruction.b = operand(b)
    elif b is not None:
        instruction.scalar *= b
        instruction.b = Operand(place=Place.SCALAR)
    if code is Code.MEAN:
        instruction.dims = a.dim() - 1
        instruction.size[a.dim() - 1] = constant(a.shape[-1])
    NativeProgram([instruction]).run(Step(tokens=1, outputs=1), 0, 1)
    return out


def close(got: torch.Tensor, expected: torch.Tensor, ulps: float = 4.0) -> None:
    """Compare with a float64 result, to some units in the last place of float32."""
    limit = ulps * 2**-24 * expected.abs() + 1.5e-38
    wrong = ~((got.double() - expected).abs() <= limit)
    same = torch.isclose(got.double(), expected, rtol=0, atol=0, equal_nan=True)
    wrong &= ~same
    assert not bool(wrong.any()), (got[wrong][:4], expected[wrong][:4])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", UNARY, ids=lambda f: f.name)
def test_functions_of_one_element(function: Unary, size: int, isa: str) -> None:
    x = random(size, seed=size) * 4
    x = surrounded(x.abs() + 0.1 if function is Unary.INVERSE_ROOT else x)
    got = execute(Code.UNARY, function, surrounded(torch.zeros(size)), x)
    # Where 1 + tanh or x - x cancel, the error is that of float32's steps.
    ulps = 64.0 if function is Unary.GELU_TANH else 8.0
    expected = UNARY[function](x.double())
    if function is Unary.GELU_TANH:
        assert bool(((got - expected).abs() <= 1e-6 * x.abs()).all())
    else:
        close(got, expected, ulps)


@pytest.mark.parametrize("function", UNARY, ids=lambda f: f.name)
def test_what_is_not_ordinary(function: Unary, isa: str) -> None:
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 88.0, 89.0, -87.0, -104.0, 1e30, -1e30]
    x = surrounded(torch.tensor(values))
    got = execute(Code.UNARY, function, torch.zeros(len(values)), x)
    expected = UNARY[function](x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    ordinary = expected.isfinite()
    assert torch.allclose(got[ordinary], expected[ordinary], rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.name)
def test_functions_of_two_elements(function: Binary, size: int, isa: str) -> None:
    a, b = random(3, size, seed=1), random(3, size, seed=2)
    out = surrounded(torch.zeros(3, size))
    assert torch.equal(execute(Code.BINARY, function, out, a, b), BINARY[function](a, b))
    # Broadcast rows, columns and numbers, as torch rounds them.
    row, column = random(size, seed=3), random(3, 1, seed=4)
    for other in (row.expand(3, size), column.expand(3, size)):
        got = execute(Code.BINARY, function, out, a, other)
        assert torch.equal(got, BINARY[function](a, other))
        got = execute(Code.BINARY, function, out, other, a)
        assert torch.equal(got, BINARY[function](other, a))
    number = torch.tensor(-1.75)
    assert torch.equal(execute(Code.BINARY, function, out, a, -1.75), BINARY[function](a, number))


def test_a_factor_of_the_second_operand(isa: str) -> None:
    a, b = random(2, 37, seed=1), random(2, 37, seed=2)
    got = execute(Code.BINARY, Binary.ADD, torch.zeros(2, 37), a, b, alpha=0.5)
    assert torch.equal(got, a + 0.5 * b)


def test_any_strides(isa: str) -> None:
    a = random(5, 4, 3, 7, seed=1).permute(2, 0, 3, 1)
    b = random(7, 1, seed=2).expand(3, 5, 7, 4)
    out = torch.zeros(7, 3, 4, 5).permute(1, 3, 0, 2)
    assert torch.equal(execute(Code.BINARY, Binary.MULTIPLY, out, a, b), a * b)
    assert torch.equal(execute(Code.UNARY, Unary.NEGATE, out, a), -a)


@pytest.mark.parametrize("size", [*SIZES, 64, 65, 896])
def test_means(size: int, isa: str) -> None:
    x = random(6, size, seed=size)
    got = execute(Code.MEAN, 0, surrounded(torch.zeros(6, 1)), x)
    expected = x.double().mean(dim=1, keepdim=True)
    allowed = 1e-6 * x.double().abs().mean(dim=1, keepdim=True)
    assert bool(((got - expected).abs() <= allowed).all())


def test_large_arrays_are_shared_among_threads(isa: str) -> None:
    a, b = random(300, 515, seed=1), random(300, 515, seed=2)
    torch.set_num_threads(3)
    try:
        got = execute(Code.BINARY, Binary.ADD, torch.zeros(300, 515), a, b)
        assert torch.equal(got, a + b)
        mean = execute(Code.MEAN, 0, torch.zeros(300, 1), a)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(mean, execute(Code.MEAN, 0, torch.zeros(300, 1), a))
