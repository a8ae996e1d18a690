"""The 4-bit kernels against float64: every layout, in parts and whole, alone and in company."""

from __future__ import annotations

import math

import pytest
import torch

from manylora_kernels import NF4Weight, nf4_linear
from manylora_kernels.tiles import tile
from support.nf4 import quantize, unpacked
from support.triton import (  # noqa: F401 - a fixture
    DEVICE,
    DTYPES,
    assert_within,
    requires_triton,
    signed,
    triton_selected,
)

pytestmark = [
    requires_triton,
    pytest.mark.usefixtures("triton_selected"),
    # The interpreter is numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Rows of whole blocks, in one part and in several, with ragged ends; rows that blocks straddle.
WHOLE = [(5, 64), (70, 192), (130, 1344)]
STRADDLING = [(7, 96), (6, 100), (33, 1100), (3, 5), (9, 7)]
# One more than a program takes at once is computed by the other path.
TOKENS = [0, 1, 17, 65]


def on_device(weight: NF4Weight) -> NF4Weight:
    tensors = [tensor.to(DEVICE) for tensor in weight.tensors]
    return NF4Weight.from_parts(tensors, weight.form, weight.absmax_offset, weight.shape[1])


def check(
    got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Half precision also rounds each weight and the result; the interpreter cuts bfloat16 off."""
    dense = dense.to(x.device)
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    roundings = {torch.float32: 4, torch.float16: 1.01, torch.bfloat16: 2}
    assert_within(got, expected, size, roundings[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", WHOLE + STRADDLING, ids=str)
def test_equals_the_equation(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    weight = on_device(quantize(shape)[0])
    x = signed(tokens, shape[1], seed=tokens, dtype=dtype)
    bias = signed(shape[0], seed=1, dtype=dtype) if tokens % 2 else None
    got = nf4_linear(x, weight, bias)
    assert (got.shape, got.dtype) == ((tokens, shape[0]), dtype)
    check(got, x, unpacked(shape), bias)


@pytest.mark.parametrize("block_size", [32, 64, 128, 512])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_kinds_and_blocks(double: bool, kind: str, block_size: int) -> None:
    weight, _ = quantize((37, 1024), kind, double=double, block_size=block_size)
    x = signed(2, 1024, seed=1)
    check(nf4_linear(x, on_device(weight)), x, weight.dequantize().double(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(130, 1344), (33, 1100)], ids=str)
def test_a_token_s_result_does_not_depend_on_the_batch(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, bias = on_device(quantize(shape)[0]), signed(shape[0], seed=3, dtype=dtype)
    x = signed(66, shape[1], seed=4, dtype=dtype)
    whole = nf4_linear(x, weight, bias)
    for rows in (slice(0, 1), slice(7, 9), slice(3, 36), slice(65, 66)):
        assert torch.equal(nf4_linear(x[rows], weight, bias), whole[rows]), rows


def test_calls_leave_nothing_behind_for_the_next() -> None:
    weight = on_device(quantize((130, 1344))[0])
    x = signed(3, 1344, seed=4)
    first = nf4_linear(x, weight)
    for _ in range(3):
        assert torch.equal(nf4_linear(x, weight), first)


@pytest.mark.parametrize("tokens", [3, 70])
def test_what_is_not_finite_stays_with_its_token(tokens: int) -> None:
    weight, x = on_device(quantize((70, 192))[0]), signed(tokens, 192, seed=1)
    clean = nf4_linear(x, weight)
    x[1, 100] = math.nan
    got = nf4_linear(x, weight)
    others = torch.arange(tokens, device=DEVICE) != 1
    assert torch.equal(got[others], clean[others])
    assert bool(got[1].isnan().all())


def test_inputs_need_not_be_contiguous() -> None:
    weight, x = on_device(quantize((33, 192))[0]), signed(192, 5, seed=1)
    assert torch.equal(nf4_linear(x.t(), weight), nf4_linear(x.t().contiguous(), weight))
    wide = signed(5, 200, seed=1)[:, 3:195]
    assert torch.equal(nf4_linear(wide, weight), nf4_linear(wide.contiguous(), weight))


def test_what_is_not_ours_is_computed_all_the_same() -> None:
    plain = quantize((33, 192))[0]
    x = signed(4, 192, seed=1)
    tiled = tile(plain)
    assert tiled is not None
    check(nf4_linear(x.cpu(), tiled), x.cpu(), unpacked((33, 192)), None)
    got = nf4_linear(x.cpu().double(), plain)
    torch.testing.assert_close(got, x.cpu().double() @ unpacked((33, 192)).t(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("columns", [1, 128, 129, 4096, 14336])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_parts_cover_every_column_once(columns: int, most: int) -> None:
    from manylora_kernels.gpu.launch import splits_of

    parts, length = splits_of(columns, 128, most)
    assert parts <= most
    assert length % 128 == 0
    assert (parts - 1) * length < columns <= parts * length


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    weight = on_device(quantize((5, 96))[0])
    given = signed(5, seed=1) if bias else None
    arguments = (signed(3, 96, seed=2), weight.tensors, weight.form, weight.absmax_offset, given)
    outcome = torch.library.opcheck(torch.ops.manylora.nf4_linear.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}, outcome
