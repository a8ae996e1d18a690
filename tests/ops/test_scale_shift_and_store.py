"""The per-token affine map and the write to the paged cache, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from manylora_kernels import scale_shift_, store_kv_
from manylora_kernels.tile_plan import float_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def signed(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (noise + 0.1 * noise.sign()).to(dtype)


def table(segments: list[tuple[int, int, int, float]]) -> torch.Tensor:
    bits = float_bits([weight for *_, weight in segments])
    rows = [(*segment[:3], weight) for segment, weight in zip(segments, bits, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 63, 65, 100])
def test_scale_shift_equals_the_equation(tokens: int, dtype: torch.dtype) -> None:
    rows, width = 5, 19
    scale = signed(rows, width, seed=1, dtype=dtype)
    shift = signed(rows, width, seed=2, dtype=dtype)
    used = [4, 1, 3]
    for row in {0, 2}:
        scale[row] = math.nan
        shift[row] = math.nan
    middle = tokens // 2
    segments = [(0, min(1, tokens), used[0], 1.0)]
    if tokens > 2:
        segments += [(middle, middle + 1, used[1], 1.0), (tokens - 1, tokens, used[2], -0.75)]
    if tokens > 10:
        # The last three tokens of the first are in both, one after the other.
        segments += [(2, 9, used[0], 0.5), (6, 11, used[1], -2.0)]
    y = signed(tokens, width, seed=3, dtype=dtype)
    expected = y.double()
    size = torch.zeros_like(expected)
    for start, end, row, weight in segments:
        for token in range(start, end):
            offset = weight * shift[row].double()
            expected[token] = expected[token] * scale[row].double() + offset
            size[token] = (size[token] + y[token].abs()) * scale[row].abs() + offset.abs()
    before = y.clone()
    scale_shift_(y, scale, shift, table(segments))
    error = (y.double() - expected).abs()
    assert bool((error <= 2 * torch.finfo(dtype).eps * size).all())
    outside = size.sum(dim=1) == 0
    assert torch.equal(y[outside], before[outside])


def test_scale_shift_of_no_segments_and_of_empty_ones() -> None:
    y, scale, shift = signed(4, 3, seed=1), signed(2, 3, seed=2), signed(2, 3, seed=3)
    before = y.clone()
    scale_shift_(y, scale, shift, torch.empty(0, 4, dtype=torch.int32))
    scale_shift_(y, scale, shift, table([(2, 2, 1, 1.0)]))
    assert torch.equal(y, before)


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (2, 6)])
def test_scale_shift_refuses_other_shapes(rows: int, width: int) -> None:
    with pytest.raises(ValueError, match="scale and shift must be"):
        scale_shift_(
            torch.zeros(4, 7),
            torch.zeros(rows, width),
            torch.zeros(2, width),
            torch.empty(0, 4, dtype=torch.int32),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 63, 100])
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_store_kv_writes_each_token_to_its_place_and_nothing_else(
    block_tokens: int, tokens: int, dtype: torch.dtype
) -> None:
    blocks, heads, key_dim, value_dim = 128 // block_tokens + 1, 2, 6, 4
    generator = torch.Generator().manual_seed(tokens)
    k_cache = torch.full((blocks, block_tokens, heads, key_dim), math.nan, dtype=dtype)
    v_cache = torch.full((blocks, block_tokens, heads, value_dim), math.nan, dtype=dtype)
    k = signed(tokens, heads, key_dim, seed=5, dtype=dtype)
    # Transposed as the model's own are, so not contiguous.
    v = signed(heads, tokens, value_dim, seed=6, dtype=dtype).transpose(0, 1)
    places = torch.randperm(128, generator=generator)[:tokens] + block_tokens
    store_kv_(k_cache, v_cache, k, v, places)
    left = set(range(blocks * block_tokens))
    for token, place in enumerate(places.tolist()):
        block, offset = divmod(place, block_tokens)
        assert torch.equal(k_cache[block, offset], k[token])
        assert torch.equal(v_cache[block, offset], v[token])
        left.discard(place)
    for place in left:
        block, offset = divmod(place, block_tokens)
        assert k_cache[block, offset].isnan().all()
        assert v_cache[block, offset].isnan().all()
