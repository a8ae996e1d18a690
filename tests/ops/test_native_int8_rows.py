"""The native linear with eight-bit rows on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from manylora_kernels import Int8Weight, int8_linear, int8_rows, native
from support.native import NAN, native_kernels, random, surrounded

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

# One panel and several with a rest; columns odd and even, on both sides of a segment of 256.
SHAPES = [(1, 1), (5, 3), (16, 64), (33, 255), (70, 256), (100, 257), (130, 1025), (64, 514)]
# Either side of what each register tile takes, and more than one chunk (264) with a rest.
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 271]


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    with native_kernels(request.param):
        yield request.param


def weight(shape: tuple[int, int]) -> Int8Weight:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] + shape[1]))
    made = int8_rows.blank(*shape, rows.device)
    int8_rows.store_rows(made, 0, rows)
    return Int8Weight(made.tiles, surrounded(made.scale), shape)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(isa: str, shape: tuple[int, int], bias: bool) -> None:
    eight = weight(shape)
    shift = random(shape[0], seed=5) if bias else None
    for tokens in TOKENS:
        x = random(tokens, shape[1], seed=tokens)
        expected = x.double() @ eight.widen().double().t()
        expected = expected if shift is None else expected + shift
        got = int8_linear(x, eight, shift)
        assert got.shape == (tokens, shape[0])
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-4), tokens


def test_every_eight_bit_number_is_widened_exactly(isa: str) -> None:
    numbers = torch.arange(-127, 128, dtype=torch.float32)[:, None]
    eight = int8_rows.blank(255, 1, numbers.device)
    int8_rows.store_rows(eight, 0, numbers)
    plain = Int8Weight(eight.tiles.clone(), torch.ones(255), (255, 1))
    sign = int8_linear(torch.ones(1, 1), plain).flatten()
    assert torch.equal(sign, numbers.flatten().sign() * 127)
    rows = torch.cat((numbers, torch.full((255, 1), 127.0)), dim=1)
    int8_rows.store_rows(eight := int8_rows.blank(255, 2, rows.device), 0, rows)
    got = int8_linear(torch.tensor([[1.0, 0.0]]), eight).flatten()
    assert torch.equal(got, numbers.flatten())


def test_a_token_s_result_does_not_depend_on_the_batch(isa: str) -> None:
    eight, bias, x = weight((37, 600)), random(37, seed=3), random(280, 600, seed=4)
    alone = torch.cat([int8_linear(x[t : t + 1], eight, bias) for t in range(280)])
    for tokens in (*range(2, 30), 263, 264, 265, 280):
        assert torch.equal(int8_linear(x[:tokens], eight, bias), alone[:tokens]), tokens


@pytest.mark.parametrize("tokens", [3, 30])
def test_what_is_not_finite_stays_with_its_token(isa: str, tokens: int) -> None:
    eight, x = weight((33, 191)), random(tokens, 191)
    clean = int8_linear(x, eight)
    x[1, 100] = NAN
    got = int8_linear(x, eight)
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], clean[others])
    assert not bool(got[1].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_types_are_computed_in_float32(isa: str, dtype: torch.dtype) -> None:
    eight = weight((33, 192))
    x, bias = random(5, 192).to(dtype), random(33).to(dtype)
    expected = int8_linear(x.float(), eight, bias.float()).to(dtype)
    assert torch.equal(int8_linear(x, eight, bias), expected)
