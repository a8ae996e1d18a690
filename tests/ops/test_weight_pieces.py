"""Weights read and made by ranges of rows, in every form that twins use."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from manylora_kernels import half as half_rows
from manylora_kernels import int8_linear, int8_rows, nf4_linear, nf4_pieces
from manylora_kernels.tiles import tile
from support.nf4 import quantize

SHAPES = [(16, 64), (37, 64), (70, 128), (64, 96), (33, 100), (100, 5)]


def ranges(rows: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "packed"])
def test_rows_of_a_4_bit_weight(shape: tuple[int, int], double: bool, tiled: bool) -> None:
    weight, _ = quantize(shape, double=double)
    whole = weight.dequantize()
    if tiled:
        made = tile(weight)
        if made is None:
            assert shape[1] == 100, "only blocks that end inside a tile cannot be tiled"
            return
        weight = made
    for step in (16, 32, 1024):
        parts = [nf4_pieces.read_rows(weight, *part) for part in ranges(shape[0], step)]
        assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="multiple of 16"):
        nf4_pieces.read_rows(weight, 8, 16)


def test_the_code_book_is_bitsandbytes() -> None:
    _, state = quantize((16, 64))
    assert torch.equal(state.code, torch.tensor(nf4_pieces.NF4_CODE))


@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_quantizing_is_bitsandbytes(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.quantize_4bit(rows, quant_type="nf4", compress_statistics=False)
    ours = nf4_pieces.quantize_rows(rows)
    assert torch.equal(ours.packed[: packed.numel()], packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax.view(-1))


def test_quantizing_keeps_what_4_bits_hold() -> None:
    weight, _ = quantize((33, 128), double=False)
    again = nf4_pieces.quantize_rows(weight.dequantize())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_quantizing_zeros() -> None:
    assert not nf4_pieces.quantize_rows(torch.zeros(16, 64)).dequantize().any()


@pytest.mark.parametrize("shape", [(70, 128), (64, 96), (37, 64), (33, 100)], ids=str)
@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "packed"])
def test_a_4_bit_weight_made_in_parts(shape: tuple[int, int], tiled: bool) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    whole = nf4_pieces.quantize_rows(rows)
    parts = [nf4_pieces.quantize_rows(rows[a:b]) for a, b in ranges(shape[0], 16)]
    if tiled:
        made = [tile(part) for part in parts]
        if None in made:
            assert shape[1] == 100
            return
        parts = [part for part in made if part is not None]
    joined = nf4_pieces.join_rows(parts)
    assert joined.shape == shape
    assert torch.equal(joined.dequantize(), whole.dequantize())
    x = torch.randn(3, shape[1])
    assert torch.allclose(nf4_linear(x, joined), x @ whole.dequantize().t(), atol=1e-4)


@pytest.mark.parametrize("dtype", half_rows.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_half_weight_in_parts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight = half_rows.blank(*shape, dtype, rows.device)
    for a, b in ranges(shape[0], 32):
        half_rows.store_rows(weight, a, rows[a:b])
    assert torch.equal(weight.tiles, half_rows.narrow(rows, dtype).tiles)
    read = torch.cat([half_rows.read_rows(weight, a, b) for a, b in ranges(shape[0], 16)])
    assert torch.equal(read, rows.to(dtype).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_eight_bit_weight(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    rows[1] = 0
    weight = int8_rows.blank(*shape, rows.device)
    stored = [int8_rows.store_rows(weight, a, rows[a:b]) for a, b in ranges(shape[0], 16)]
    assert torch.equal(weight.widen(), torch.cat(stored))
    # Half of a step at the most, a step being the largest of the row over 127.
    assert (weight.widen() - rows).abs().le(rows.abs().amax(1, keepdim=True) / 253).all()
    assert not weight.widen()[1].any()
    x, bias = torch.randn(3, shape[1]), torch.randn(shape[0])
    expected = x.double() @ weight.widen().double().t() + bias
    assert torch.allclose(int8_linear(x, weight, bias).double(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="x must be"):
        int8_linear(x[:, 1:], weight)
