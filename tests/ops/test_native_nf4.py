"""The native 4-bit linear on every instruction set of this machine, against float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from manylora_kernels import NF4Weight, native, nf4_linear, prepare_nf4, select_backend
from manylora_kernels.native.binding import ISAS
from manylora_kernels.tiles import segment_of, tile, untile
from support.native import NAN, native_kernels, random
from support.nf4 import quantize, unpack, unpacked

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

# Rows of whole blocks, rows that blocks straddle (segments of 32 and 8 columns), several panels.
SHAPES = [(1, 64), (5, 64), (16, 128), (33, 192), (70, 576), (7, 96), (260, 96), (37, 72)]
UNTILEABLE = [(4, 172), (6, 100), (3, 5)]
# Either side of what each path takes at once, and more than one chunk (264) with a rest.
TOKENS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 24, 25, 30, 48, 49, 271]


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    with native_kernels(request.param):
        yield request.param


@pytest.mark.parametrize("name", ISAS)
def test_which_instruction_sets_were_tested(name: str) -> None:
    if name not in native.library.isas:
        pytest.skip(f"this machine does not run {name}: its kernels were not tested")


def tiled(shape: tuple[int, int], **how: object) -> NF4Weight:
    weight = prepare_nf4(quantize(shape, **how)[0])  # type: ignore[arg-type]
    assert weight.tiled
    return weight


def check(
    got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None
) -> None:
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert bool(((got.double() - expected).abs() <= 4e-7 * size + 1e-9).all())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equation(isa: str, shape: tuple[int, int], tokens: int) -> None:
    weight = tiled(shape)
    x, bias = random(tokens, shape[1], seed=tokens), random(shape[0], seed=1)
    for given in (None, bias):
        got = nf4_linear(x, weight, given)
        assert (got.shape, got.dtype) == ((tokens, shape[0]), torch.float32)
        check(got, x, unpacked(shape), given)


@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_kinds_and_blocks(isa: str, double: bool, kind: str, block_size: int) -> None:
    for shape in ((21, 4096 // 8), (18, 4096)):
        weight, _ = quantize(shape, kind, double=double, block_size=block_size)
        dense, weight = weight.dequantize().double(), prepare_nf4(weight)
        assert weight.tiled
        for tokens in (1, 20):
            x = random(tokens, shape[1])
            check(nf4_linear(x, weight), x, dense, None)


def test_blocks_of_thirty_two(isa: str) -> None:
    weight, _ = quantize((16, 128), double=False)
    halves = weight.absmax.repeat_interleave(2)
    smaller = NF4Weight(weight.packed, weight.code, halves, (16, 128), 32)
    x = random(3, 128)
    check(nf4_linear(x, prepare_nf4(smaller)), x, unpack(weight), None)


@pytest.mark.parametrize("shape", [(70, 576), (37, 72)], ids=str)
def test_a_token_s_result_does_not_depend_on_the_batch(isa: str, shape: tuple[int, int]) -> None:
    weight, bias = tiled(shape), random(shape[0], seed=3)
    x = random(280, shape[1], seed=4)
    alone = torch.cat([nf4_linear(x[t : t + 1], weight, bias) for t in range(280)])
    for tokens in (*range(2, 30), 48, 49, 263, 264, 265, 280):
        assert torch.equal(nf4_linear(x[:tokens], weight, bias), alone[:tokens]), tokens
    assert torch.equal(nf4_linear(x[3:19], weight, bias), alone[3:19])


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    weight = tiled((330, 576))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 3, 17, 100):
            x = random(tokens, 576)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(nf4_linear(x, weight))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("tokens", [3, 30])
def test_what_is_not_finite_stays_with_its_token(isa: str, tokens: int, bad: float) -> None:
    weight, x = tiled((33, 192)), random(tokens, 192)
    clean = nf4_linear(x, weight)
    x[1, 100] = bad
    got = nf4_linear(x, weight)
    others = torch.arange(tokens) != 1
    assert torch.equal(got[others], clean[others])
    assert not bool(got[1].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_computed_in_float32(isa: str, dtype: torch.dtype) -> None:
    weight, x, bias = tiled((33, 192)), random(5, 192).to(dtype), random(33).to(dtype)
    expected = nf4_linear(x.float(), weight, bias.float()).to(dtype)
    assert torch.equal(nf4_linear(x, weight, bias), expected)


def test_inputs_need_not_be_contiguous(isa: str) -> None:
    weight, x = tiled((33, 192)), random(192, 5)
    assert torch.equal(nf4_linear(x.t(), weight), nf4_linear(x.t().contiguous(), weight))


def test_two_threads_at_once(isa: str) -> None:
    weight = tiled((330, 576))
    inputs = [random(tokens, 576, seed=tokens) for tokens in (1, 50)]
    expected = [nf4_linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        torch.set_num_threads(2)
        for _ in range(50):
            if not torch.equal(nf4_linear(inputs[index], weight), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 20])
def test_opcheck(isa: str, tokens: int, bias: bool) -> None:
    weight = tiled((5, 96))
    given = torch.randn(5) if bias else None
    arguments = (torch.randn(tokens, 96), weight.tensors, weight.form, weight.absmax_offset, given)
    outcome = torch.library.opcheck(torch.ops.manylora.nf4_linear.default, arguments)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.parametrize("shape", UNTILEABLE, ids=str)
def test_what_cannot_be_tiled_is_computed_all_the_same(isa: str, shape: tuple[int, int]) -> None:
    torch.use_deterministic_algorithms(False)  # bitsandbytes' way is not ours to poison
    weight = prepare_nf4(quantize(shape)[0])
    assert segment_of(shape[1], 64) is None
    assert not weight.tiled
    x = random(4, shape[1])
    check(nf4_linear(x, weight), x, unpacked(shape), None)


def test_what_was_not_prepared_is_computed_all_the_same(isa: str) -> None:
    torch.use_deterministic_algorithms(False)
    x = random(4, 192)
    check(nf4_linear(x, quantize((33, 192))[0]), x, unpacked((33, 192)), None)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiling_loses_nothing(shape: tuple[int, int], double: bool) -> None:
    weight, _ = quantize(shape, double=double)
    other = tile(weight)
    assert other is not None
    back = untile(other)
    assert torch.equal(back.packed.reshape(-1), weight.packed.reshape(-1))
    assert torch.equal(back.absmax, weight.absmax)
    assert torch.equal(other.dequantize(), weight.dequantize())


def test_tensors_of_other_types_are_not_tiled() -> None:
    weight, _ = quantize((33, 192), double=False)
    assert tile(replace(weight, absmax=weight.absmax.half())) is None
    assert tile(replace(weight, code=weight.code.double())) is None


def test_tiling_costs_no_memory() -> None:
    weight, _ = quantize((64, 128))
    other = tile(weight)
    assert other is not None
    assert other.bytes == weight.bytes


def test_the_reference_and_bitsandbytes_read_tiles_too() -> None:
    weight = tile(quantize((33, 192))[0])
    assert weight is not None
    x = random(4, 192)
    try:
        for backend in ("reference", "bitsandbytes"):
            select_backend("nf4_linear", backend)
            check(nf4_linear(x, weight), x, unpacked((33, 192)), None)
    finally:
        select_backend("nf4_linear", "reference")
