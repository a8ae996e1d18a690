"""The per-token affine map and the write to the paged cache by Triton, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from manylora_kernels import Segment, SegmentMap, scale_shift_, store_kv_
from support.triton import (  # noqa: F401 - a fixture
    DEVICE,
    DTYPES,
    assert_within,
    requires_triton,
    signed,
    triton_selected,
)

pytestmark = [requires_triton, pytest.mark.usefixtures("triton_selected")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_shift_equals_the_equation(dtype: torch.dtype) -> None:
    tokens, width = 12, 1030
    scale, shift = (signed(5, width, seed=seed, dtype=dtype) for seed in (1, 2))
    scale[[0, 2]], shift[[0, 2]] = math.nan, math.nan
    y = signed(tokens, width, seed=3, dtype=dtype)
    y[1] = math.nan
    segments = [
        *(Segment(0, 1, 7), Segment(2, 6, 8, 0.5), Segment(8, 8, 9), Segment(11, 12, 9)),
        *(Segment(4, 8, 9, -2.0), Segment(5, 6, 7, 0.25)),
    ]
    rows = {7: 4, 8: 1, 9: 3}
    table = SegmentMap(segments, tokens, device=DEVICE).resolve_rows(rows)
    assert table is not None
    assert table.device == DEVICE
    expected, size = y.double(), torch.zeros_like(y).double()
    for start, end, slot, weight in segments:
        factor, offset = scale[rows[slot]].double(), weight * shift[rows[slot]].double()
        expected[start:end] = expected[start:end] * factor + offset
        size[start:end] = (size[start:end] + y[start:end].abs()) * factor.abs() + offset.abs()
    before = y.clone()
    padded = torch.cat((table, table.new_zeros(3, 4)))
    scale_shift_(y, scale, shift, padded)
    outside = size.sum(dim=1) == 0
    assert torch.equal(y[outside].nan_to_num(), before[outside].nan_to_num())
    assert_within(y[~outside], expected[~outside], size[~outside], 1)


def test_scale_shift_of_nothing() -> None:
    y, pool = signed(4, 3, seed=1), signed(2, 3, seed=2)
    before = y.clone()
    scale_shift_(y, pool, pool, torch.zeros(0, 4, dtype=torch.int32, device=DEVICE))
    scale_shift_(y[:0], pool, pool, torch.zeros(1, 4, dtype=torch.int32, device=DEVICE))
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_store_kv_writes_each_token_to_its_place_and_nothing_else(
    tokens: int, dtype: torch.dtype
) -> None:
    blocks, size, heads, key_dim, value_dim = 9, 4, 2, 6, 4
    k_cache = torch.full((blocks, size, heads, key_dim), math.nan, dtype=dtype, device=DEVICE)
    v_cache = torch.full((blocks, size, heads, value_dim), math.nan, dtype=dtype, device=DEVICE)
    k = signed(tokens, heads, key_dim, seed=5, dtype=dtype)
    # Transposed as the model's own are, so not contiguous.
    v = signed(heads, tokens, value_dim, seed=6, dtype=dtype).transpose(0, 1)
    places = torch.randperm(32, generator=torch.Generator().manual_seed(tokens))[:tokens] + size
    places[tokens // 2 : tokens // 2 + 1] = -1
    store_kv_(k_cache, v_cache, k, v, places.to(DEVICE))
    keys, values = k_cache.view(-1, heads, key_dim), v_cache.view(-1, heads, value_dim)
    for token, place in enumerate(places.tolist()):
        if place >= 0:
            assert torch.equal(keys[place], k[token])
            assert torch.equal(values[place], v[token])
    left = [place for place in range(blocks * size) if place not in places.tolist()]
    assert keys[left].isnan().all()
    assert values[left].isnan().all()
