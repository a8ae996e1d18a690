"""4-bit weights: the reference, bitsandbytes' operator and a loop over single weights agree."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from manylora_kernels import (
    available_backends,
    nf4_linear,
    prepare_nf4,
    select_backend,
    selected_backend,
)
from support.nf4 import quantize, unpack, unpacked

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WHOLE_ROWS = [(5, 64), (1, 128), (33, 192), (300, 64)]
# Blocks of 64 straddle these rows; the last two have an odd number of weights.
STRADDLING = [(7, 96), (4, 172), (6, 100), (260, 96), (3, 5), (9, 7)]
SHAPES = WHOLE_ROWS + STRADDLING
# Those in eight bits have tests of their own.
BACKENDS = [name for name in available_backends("nf4_linear") if "int8" not in name]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = selected_backend("nf4_linear")
    select_backend("nf4_linear", request.param)
    yield request.param
    select_backend("nf4_linear", before)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_equals_the_equations(shape: tuple[int, int], double: bool, kind: str) -> None:
    weight, _ = quantize(shape, kind, double=double)
    torch.testing.assert_close(weight.dequantize().double(), unpack(weight), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", WHOLE_ROWS, ids=str)
def test_dequantize_equals_bitsandbytes(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    weight, state = quantize(shape, kind)
    state.dtype = dtype
    theirs = bnb.dequantize_4bit(weight.packed, state)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(weight.dequantize(dtype), theirs, atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_equals_bitsandbytes_own_portable_code(
    shape: tuple[int, int], kind: str
) -> None:
    weight, _ = quantize(shape, kind)
    theirs = _dequantize_4bit_compute(
        weight.packed.reshape(-1), weight.block_maxima(), weight.code, 64, shape, torch.float32
    )
    assert torch.equal(weight.dequantize(), theirs)


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_block_sizes(backend: str, block_size: int) -> None:
    weight, _ = quantize((70, 256), block_size=block_size)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ unpack(weight).t()
    torch.testing.assert_close(
        nf4_linear(x, prepare_nf4(weight)).double(), expected, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_the_equation(
    backend: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    weight, _ = quantize(shape)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    dense = unpacked(shape)
    for given in (None, bias):
        got = nf4_linear(x, prepare_nf4(weight), given)
        assert (got.shape, got.dtype) == ((tokens, shape[0]), dtype)
        expected = x.double() @ dense.t()
        size = x.double().abs() @ dense.abs().t()
        if given is not None:
            expected += given.double()
            size += given.double().abs()
        limit = 8 * torch.finfo(dtype).eps * size + 1e-9
        assert bool(((got.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_agree(shape: tuple[int, int], double: bool, kind: str) -> None:
    weight, _ = quantize(shape, kind, double=double)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(2))
    results = []
    before = selected_backend("nf4_linear")
    try:
        for name in BACKENDS:
            select_backend("nf4_linear", name)
            results.append(nf4_linear(x, prepare_nf4(weight)))
    finally:
        select_backend("nf4_linear", before)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-6, rtol=1e-6)


def test_the_packed_weight_is_never_written_to(backend: str) -> None:
    weight = prepare_nf4(quantize((33, 192))[0])
    tensors = [weight.packed, weight.code, weight.absmax, weight.absmax_code, weight.absmax_scale]
    before = [tensor.clone() for tensor in tensors if tensor is not None]
    for _ in range(2):
        nf4_linear(torch.randn(4, 192), weight, torch.randn(33))
    assert all(map(torch.equal, before, [t for t in tensors if t is not None]))


def test_bytes_counts_every_tensor() -> None:
    single, _ = quantize((300, 64), double=False)
    double, _ = quantize((300, 64))
    assert single.bytes == 300 * 32 + 16 * 4 + 300 * 4
    assert double.bytes == 300 * 32 + 16 * 4 + 300 + 256 * 4 + 2 * 4


@pytest.mark.parametrize("shape", [(63,), (3, 63), (1, 3, 64)], ids=str)
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    weight, _ = quantize((5, 64))
    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        nf4_linear(torch.zeros(shape), weight)
