"""The native linear with half-width weights on every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from manylora_kernels import HalfWeight, half_embedding, half_linear, halve, native
from manylora_kernels.half import narrow
from support.native import NAN, native_kernels, random

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]
# One panel and several with a rest; columns odd and even, on both sides of a segment of 256.
SHAPES = [(1, 1), (5, 3), (16, 64), (33, 255), (70, 256), (100, 257), (130, 1025), (64, 514)]
# Either side of what each register tile takes, and more than one chunk (264) with a rest.
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 271]


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    with native_kernels(request.param):
        yield request.param


def weight(shape: tuple[int, int], dtype: torch.dtype) -> HalfWeight:
    return narrow(random(*shape, seed=7), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equation(
    isa: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> None:
    half = weight(shape, dtype)
    dense = half.widen(torch.float64)
    x, bias = random(tokens, shape[1], seed=tokens), random(shape[0], seed=1)
    for given in (None, bias):
        got = half_linear(x, half, given)
        assert (got.shape, got.dtype) == ((tokens, shape[0]), torch.float32)
        expected = x.double() @ dense.t()
        size = x.double().abs() @ dense.abs().t()
        if given is not None:
            expected, size = expected + given.double(), size + given.double().abs()
        assert bool(((got.double() - expected).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_is_widened_exactly(isa: str, dtype: torch.dtype) -> None:
    """Subnormal numbers, both zeros and infinities included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)[:, None]
    got = half_linear(torch.ones(1, 1), narrow(numbers, dtype)).flatten()
    wide = numbers.float().flatten()
    assert torch.equal(got.isnan(), wide.isnan())
    assert torch.equal(got.nan_to_num(7.0, 8.0, 9.0), wide.nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 255), (37, 600)], ids=str)
def test_a_token_s_result_does_not_depend_on_the_batch(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    half, bias, x = weight(shape, dtype), random(shape[0], seed=3), random(280, shape[1], seed=4)
    alone = torch.cat([half_linear(x[t : t + 1], half, bias) for t in range(280)])
    for tokens in (*range(2, 30), 263, 264, 265, 280):
        assert torch.equal(half_linear(x[:tokens], half, bias), alone[:tokens]), tokens
    assert torch.equal(half_linear(x[3:19], half, bias), alone[3:19])


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    half = weight((330, 576), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 3, 17, 100):
            x = random(tokens, 576)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(half_linear(x, half))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("tokens", [3, 30])
def test_what_is_not_finite_stays_with_its_token(isa: str, tokens: int, bad: float) -> None:
    half, x = weight((33, 191), torch.bfloat16), random(tokens, 191)
    clean = half_linear(x, half)
    x[1, 100] = bad
    got = half_linear(x, half)
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], clean[others])
    assert not bool(got[1].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_computed_in_float32(isa: str, dtype: torch.dtype) -> None:
    half = weight((33, 192), torch.bfloat16)
    x, bias = random(5, 192).to(dtype), random(33).to(dtype)
    expected = half_linear(x.float(), half, bias.float()).to(dtype)
    assert torch.equal(half_linear(x, half, bias), expected)


def test_inputs_need_not_be_contiguous(isa: str) -> None:
    half, wide = weight((33, 192), torch.bfloat16), random(192, 200)
    for x in (wide[:, :5].t(), wide[:5, 3:195], wide[::2, :192]):
        assert torch.equal(half_linear(x, half), half_linear(x.contiguous(), half))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 20])
def test_opcheck(isa: str, tokens: int, bias: bool) -> None:
    half = weight((5, 95), torch.bfloat16)
    arguments = (torch.randn(tokens, 95), half.tiles, 5, torch.randn(5) if bias else None)
    outcome = torch.library.opcheck(torch.ops.manylora.half_linear.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5000, 9)], ids=str)
def test_halving_loses_nothing(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = random(*shape).to(dtype).float()
    half = halve(dense)
    assert half is not None
    assert torch.equal(half.widen(), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 255), (100, 64)], ids=str)
def test_rows_are_those_of_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    half = weight(shape, dtype)
    for count in (0, 3, shape[0]):
        index = torch.arange(count).flip(0) % shape[0]
        rows = half_embedding(index, half)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, half.widen()[index])


def test_what_16_bits_do_not_hold_is_not_halved() -> None:
    dense = random(5000, 9).bfloat16().float()
    dense[4999, 8] = 1 + 2**-20
    assert halve(dense) is None
    # Each number fits one of the two, but not all the same one.
    assert halve(torch.tensor([[1e-30, 1 + 2**-10]]).half().float()) is not None
    assert halve(torch.tensor([[2.0**-60, 1 + 2**-10]])) is None
    assert halve(torch.tensor([[NAN]])) is None


def test_the_reference_computes_it_too() -> None:
    half, x = weight((33, 191), torch.float16), random(4, 191)
    torch.testing.assert_close(half_linear(x, half), x @ half.widen().t())


def test_other_shapes_are_refused() -> None:
    half = weight((33, 191), torch.float16)
    with pytest.raises(ValueError, match=r"x must be \[T, 191\]"):
        half_linear(random(4, 192), half)
    with pytest.raises(ValueError, match="tiles must be"):
        half_linear(random(4, 191), HalfWeight(half.tiles.float(), half.shape))
    with pytest.raises(ValueError, match="tiles must be"):
        half_linear(random(4, 191), HalfWeight(half.tiles[:2], half.shape))
