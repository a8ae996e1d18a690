"""The native 4-bit linear in eight bits: the reference's bits, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from manylora_kernels import (
    NF4Weight,
    native,
    nf4_linear,
    nf4_linear_in_float,
    prepare_nf4,
    select_backend,
    selected_backend,
)
from manylora_kernels.reference.int8 import REFERENCE_INT8, quantize_activations
from support.native import NAN, native_kernels, surrounded
from support.nf4 import quantize, unpack, unpacked

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

from manylora_kernels.native import int8

# Segments of 64, 32 and 8 columns, an odd and an even number of them, several panels.
SHAPES = [(1, 64), (16, 128), (33, 192), (70, 576), (7, 96), (260, 96), (37, 72)]
# Either side of what a tile of each instruction set holds, and of where AMX begins.
TOKENS = [0, 1, 2, 3, 4, 5, 8, 13, 14, 15, 16, 17, 29, 33, 100]
WAYS = [*native.library.isas, "amx"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    isas = native.library.isas
    amx = request.param == "amx"
    if amx and not (isas[-1] == "avx512" and int8.amx_available()):
        pytest.skip("this machine has no AMX: its kernels were not tested")
    with native_kernels("avx512" if amx else request.param):
        select_backend("nf4_linear", native.NATIVE_INT8)
        int8.allow_amx(amx)
        yield request.param
        int8.allow_amx(True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values of very different sizes, of both signs, with NaN on all sides."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp(2 * torch.randn(shape, generator=generator))
    return surrounded(values)


def tiled(shape: tuple[int, int], **how: object) -> NF4Weight:
    weight = prepare_nf4(quantize(shape, **how)[0])  # type: ignore[arg-type]
    assert weight.tiled
    return weight


def by_reference(
    x: torch.Tensor, weight: NF4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    selected = selected_backend("nf4_linear")
    select_backend("nf4_linear", REFERENCE_INT8)
    try:
        return nf4_linear(x, weight, bias)
    finally:
        select_backend("nf4_linear", selected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_the_reference_s_bits(way: str, shape: tuple[int, int], tokens: int) -> None:
    weight = tiled(shape)
    x, bias = random(tokens, shape[1], seed=tokens), random(shape[0], seed=1)
    for given in (None, bias):
        got = nf4_linear(x, weight, given)
        assert (got.shape, got.dtype) == ((tokens, shape[0]), torch.float32)
        assert torch.equal(got, by_reference(x, weight, given))


@pytest.mark.parametrize("block_size", [64, 128, 256, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_kinds_and_blocks(way: str, double: bool, kind: str, block_size: int) -> None:
    for shape in ((21, 512), (18, 4096)):
        weight = tiled(shape, kind=kind, double=double, block_size=block_size)
        for tokens in (1, 20):
            x = random(tokens, shape[1])
            assert torch.equal(nf4_linear(x, weight), by_reference(x, weight))


def test_the_largest_sums_fit(way: str) -> None:
    """All weights and all activations at their largest, of all combinations of signs."""
    weight, _ = quantize((32, 256), block_size=128, double=False)
    weight.packed.copy_(torch.tensor([0xFF, 0x00]).repeat_interleave(128).repeat(16)[:, None])
    weight = prepare_nf4(weight)
    for tokens in (1, 2, 20):
        x = torch.ones(tokens, 256)
        x[-1] = -1
        got = nf4_linear(x, weight)
        assert torch.equal(got, by_reference(x, weight))
        assert bool((got.abs().amax(1) > 0).all())


@pytest.mark.parametrize("shape", [(70, 576), (37, 72)], ids=str)
def test_a_token_s_result_does_not_depend_on_the_batch(way: str, shape: tuple[int, int]) -> None:
    weight, bias = tiled(shape), random(shape[0], seed=3)
    x = random(70, shape[1], seed=4)
    alone = torch.cat([nf4_linear(x[t : t + 1], weight, bias) for t in range(70)])
    for tokens in (*range(2, 34), 70):
        assert torch.equal(nf4_linear(x[:tokens], weight, bias), alone[:tokens]), tokens


def test_the_number_of_threads_changes_nothing(way: str) -> None:
    weight = tiled((330, 576))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 17, 100):
            x = random(tokens, 576)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(nf4_linear(x, weight))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [NAN, -NAN, float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("tokens", [3, 30])
def test_what_is_not_finite_spoils_its_token_s_row_only(way: str, tokens: int, bad: float) -> None:
    weight, x = tiled((33, 192)), random(tokens, 192)
    clean = nf4_linear(x, weight)
    x[1, 100] = bad
    got = nf4_linear(x, weight)
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], clean[others])
    assert bool(got[1].isnan().all())


@pytest.mark.parametrize("tokens", [1, 20])
def test_zeros_and_the_smallest_and_largest_numbers(way: str, tokens: int) -> None:
    weight, bias = tiled((33, 192)), random(33)
    assert torch.equal(nf4_linear(torch.zeros(tokens, 192), weight), torch.zeros(tokens, 33))
    assert torch.equal(nf4_linear(torch.zeros(tokens, 192), weight, bias), bias.expand(tokens, 33))
    for size in (1e-45, 1e-38, 2.0**-100, 1e-30, 1e30, 3e36):
        x = random(tokens, 192).clamp(-1, 1) * size
        got = nf4_linear(x, weight)
        assert bool(got.isfinite().all())
        assert torch.equal(got, by_reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_computed_from_float32(way: str, dtype: torch.dtype) -> None:
    weight, bias = tiled((33, 192)), torch.randn(33).to(dtype)
    x = torch.randn(5, 192).to(dtype)
    expected = nf4_linear(x.float(), weight, bias.float()).to(dtype)
    assert torch.equal(nf4_linear(x, weight, bias), expected)


def test_the_error_is_that_of_eight_bits(way: str) -> None:
    """Near the exact product of the unrounded weight: a small part of what NF4 itself costs."""
    weight = tiled((70, 576))
    x = torch.randn(40, 576)
    exact = x.double() @ unpacked((70, 576)).t()
    error = (nf4_linear(x, weight) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.01


@pytest.mark.parametrize("tokens", [2, 20])
def test_opcheck(way: str, tokens: int) -> None:
    weight = tiled((5, 96))
    arguments = (torch.randn(tokens, 96), weight.tensors, weight.form, weight.absmax_offset, None)
    outcome = torch.library.opcheck(torch.ops.manylora.nf4_linear.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_what_cannot_be_tiled_is_computed_in_float() -> None:
    select_backend("nf4_linear", native.NATIVE_INT8)
    try:
        weight = prepare_nf4(quantize((6, 100))[0])
        assert not weight.tiled
        x = torch.randn(4, 100)
        exact = x.double() @ unpacked((6, 100)).t()
        for result in (nf4_linear(x, weight), by_reference(x, weight)):
            assert torch.allclose(result.double(), exact, atol=1e-5)
        with nf4_linear_in_float():
            assert selected_backend("nf4_linear") == native.NATIVE
        assert selected_backend("nf4_linear") == native.NATIVE_INT8
    finally:
        select_backend("nf4_linear", "reference")


@pytest.mark.parametrize("shape", [(16, 128), (7, 96)], ids=str)
def test_the_reference_is_its_equation(shape: tuple[int, int]) -> None:
    """Of an untiled weight too, one segment at a time in float64."""
    weight, _ = quantize(shape)
    segment = 64 if shape[1] % 64 == 0 else 32
    x = torch.randn(3, shape[1])
    q, scale = quantize_activations(x, segment)
    assert int(q.abs().max()) == 127
    rounded = (q * scale[..., None] * 127).reshape(x.shape)
    assert bool(((rounded - x).view(3, -1, segment).abs() <= 64 * scale[..., None]).all())
    steps = torch.round(weight.code.double() * 127) / 127
    assert float((steps - weight.code.double()).abs().max()) < 0.5 / 127
    coarse = unpack(NF4Weight(**{**_fields(weight), "code": steps.float()}))
    expected = rounded.double() @ coarse.t()
    assert torch.allclose(by_reference(x, weight).double(), expected, atol=1e-5)


def _fields(weight: NF4Weight) -> dict[str, object]:
    return {name: getattr(weight, name) for name in NF4Weight.__dataclass_fields__}
