"""The native attention on every instruction set of this machine, against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from manylora_kernels import native, paged_attention, select_backend, store_kv_
from support.attention import CASES, MIXED, Batch, Case, make, oracle
from support.native import NAN, native_kernels

if native.missing is not None:
    pytest.skip(f"no native kernels: {native.missing}", allow_module_level=True)

# Several tiles of 64 keys and parts of 512, and both sides of their ends.
LONG = [(1100, 1), (513, 1), (512, 1), (64, 1), (65, 1), (600, 30), (1030, 9)]
MORE = {
    "several parts": Case(LONG, block_tokens=16),
    "several parts, window, cap and sinks": Case(
        LONG, heads=6, block_tokens=16, window=470, softcap=5.0, sinks=True
    ),
    "a window over one end of a part": Case([(530, 1), (600, 100)], window=40, block_tokens=32),
    "dimensions of one": Case(MIXED, key_dim=1, value_dim=1),
    "dimensions of no vector": Case(MIXED, key_dim=17, value_dim=19),
    "dimensions of several vectors and a rest": Case(MIXED, key_dim=72, value_dim=45),
    "dimensions of models": Case(MIXED, heads=6, key_dim=64, value_dim=128, block_tokens=16),
    "seven heads to one": Case(MIXED, heads=14, key_dim=16, value_dim=64),
    "as many heads as fill tiles": Case(MIXED, heads=25, kv_heads=1, key_dim=16, value_dim=32),
    "more heads than a unit's rows": Case([(70, 1), (20, 3)], heads=200, kv_heads=1),
    "pages that end inside of a tile": Case(MIXED, block_tokens=5),
    "a page wider than a tile": Case([(90, 1), (150, 20)], block_tokens=100),
}
ALL = {**CASES, **MORE}


@pytest.fixture(params=native.library.isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, with uninitialized memory full of NaN."""
    with native_kernels(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def made(name: str, spare_blocks: int) -> tuple[Batch, torch.Tensor]:
    """Return a case's batch and what is right for it; the loops take their time."""
    case = ALL[name]
    batch = make(case, torch.float32, spare_blocks=spare_blocks)
    return batch, oracle(case, batch, case.key_dim**-0.5)


@pytest.mark.parametrize("spare_blocks", [0, 2])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_equation(isa: str, name: str, spare_blocks: int) -> None:
    case, scale = ALL[name], ALL[name].key_dim ** -0.5
    batch, expected = made(name, spare_blocks)
    # As a model's own: transposed, with something else behind every row.
    wide = torch.full((case.heads, len(batch.q), case.key_dim + 3), NAN)
    wide[..., : case.key_dim] = batch.q.transpose(0, 1)
    strided = replace(batch, q=wide[..., : case.key_dim].transpose(0, 1))
    got = strided.run(case, scale)
    assert (got.shape, got.dtype) == ((len(batch.q), case.heads, case.value_dim), torch.float32)
    assert not got.isnan().any()
    assert float((got.double() - expected).abs().max()) < 2e-6
    assert torch.equal(batch.run(case, scale), got)


def chunk(batch: Batch, case: Case, row: int, first: int, last: int) -> torch.Tensor:
    """Return what queries at positions [first, last) of sequence ``row`` get by themselves."""
    length, count = case.lengths[row]
    begin = int(batch.starts[row]) - (length - count)
    return paged_attention(
        batch.q[begin + first : begin + last],
        batch.k_cache,
        batch.v_cache,
        batch.tables[row : row + 1],
        torch.tensor([last], dtype=torch.int32),
        torch.tensor([0, last - first], dtype=torch.int32),
        int(last - first == 1),
        0.4,
        case.window,
        case.softcap,
        batch.sinks,
    )


def chunks(case: Case, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first, last) so that chunks of ``sizes`` in turn cover every query."""
    for row, (length, count) in enumerate(case.lengths):
        first, index = length - count, 0
        while first < length:
            last = min(length, first + sizes[index % len(sizes)])
            yield row, first, last
            first, index = last, index + 1


@pytest.mark.parametrize("how", [{}, {"window": 90}, {"softcap": 3.0, "sinks": True}], ids=str)
@pytest.mark.parametrize("sizes", [(1,), (7,), (3, 64, 1)], ids=str)
def test_a_query_s_result_does_not_depend_on_batch_or_chunk(
    isa: str, sizes: tuple[int, ...], how: dict[str, float]
) -> None:
    lengths = [(1, 1), (530, 1), (40, 40), (570, 130)]
    case = replace(Case(lengths, heads=6, key_dim=20, value_dim=24, block_tokens=16), **how)
    batch = make(case, torch.float32)
    together = batch.run(case)
    parts = [chunk(batch, case, *which) for which in chunks(case, sizes)]
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("window", [0, 600])
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing(isa: str, window: int, kv_heads: int) -> None:
    for lengths in ([(1700, 1)], [(1700, 1), (900, 1), (1100, 70)], [(40, 1)] * 20):
        case = Case(lengths, heads=6, kv_heads=kv_heads, key_dim=64, value_dim=64, window=window)
        batch = make(case, torch.float32)
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(batch.run(case))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf], ids=str)
def test_keys_that_a_query_does_not_see_do_not_reach_it(isa: str, poison: float) -> None:
    case = Case([(200, 200)], heads=4, key_dim=16, value_dim=24, window=50, block_tokens=8)
    batch = make(case, torch.float32)
    clean = batch.run(case)
    for position in (0, 77, 127, 199):
        place = int(batch.tables[0, position // 8]), position % 8
        saved = batch.k_cache[place].clone(), batch.v_cache[place].clone()
        batch.k_cache[place], batch.v_cache[place] = poison, poison
        got = batch.run(case)
        batch.k_cache[place], batch.v_cache[place] = saved
        blind = torch.ones(200, dtype=torch.bool)
        blind[position : position + 50] = False
        assert torch.equal(got[blind], clean[blind]), position
        assert not bool(got[~blind].isfinite().all(dim=2).any())


def test_weights_are_exact_to_the_last_bits(isa: str) -> None:
    """Two keys of scores 0 and -x: the second one's weight is 1 / (1 + e^x)."""
    scores = torch.cat((torch.linspace(0, 86, 4001), torch.tensor([87.5, 1e4, 3e38])))
    count = len(scores)
    k_cache = torch.zeros(count + 1, 2, 1, 1)
    k_cache[1:, 1, 0, 0] = -scores
    v_cache = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).repeat(count + 1, 1, 1, 1)
    got = paged_attention(
        torch.ones(count, 1, 1),
        k_cache,
        v_cache,
        torch.arange(1, count + 1, dtype=torch.int32)[:, None],
        torch.full((count,), 2, dtype=torch.int32),
        torch.arange(count + 1, dtype=torch.int32),
        count,
        1.0,
    ).flatten()
    expected = 1 / (1 + scores.double().exp())
    error = (got.double() - expected).abs() / expected
    assert float(error[: count - 3].max()) < 3 * 2**-23
    assert got[count - 3 :].tolist() == [0, 0, 0]


def test_softcap_is_exact_to_the_last_bits(isa: str) -> None:
    """One key against a sink of 0: the output is 1 / (1 + e^-z) for z = cap * tanh(x / cap)."""
    x = torch.cat((torch.linspace(-60, 60, 4001), torch.logspace(-6, 2, 300)))
    count = len(x)
    got = paged_attention(
        x.view(count, 1, 1),
        torch.ones(2, 1, 1, 1),
        torch.ones(2, 1, 1, 1),
        torch.ones(count, 1, dtype=torch.int32),
        torch.ones(count, dtype=torch.int32),
        torch.arange(count + 1, dtype=torch.int32),
        count,
        1.0,
        softcap=4.0,
        sinks=torch.zeros(1),
    ).flatten()
    z = 4 * torch.tanh(x.double() / 4)
    expected = 1 / (1 + torch.exp(-z))
    assert float(((got.double() - expected).abs() / expected).max()) < 6 * 2**-23


def test_scores_of_minus_infinity_weigh_nothing(isa: str) -> None:
    case = Case([(70, 3)], block_tokens=8)
    batch = make(case, torch.float32)
    batch.k_cache[batch.tables[0, 0].long(), :, :, 0] = -math.inf
    batch.q[:, :, 0] = 1.0
    got = batch.run(case)
    batch.keys[0][:8, :, 0] = -1e30
    assert float((got.double() - oracle(case, batch)).abs().max()) < 3e-6


def test_other_dtypes_are_left_to_the_reference(isa: str) -> None:
    torch.use_deterministic_algorithms(False)
    case = CASES["groups of two"]
    batch = make(case, torch.bfloat16)
    got = batch.run(case)
    select_backend("paged_attention", "reference")
    assert torch.equal(got, batch.run(case))


@pytest.mark.parametrize("wrong", ["table", "context", "starts", "table width"])
def test_what_points_outside_is_refused(isa: str, wrong: str) -> None:
    case = Case([(9, 1), (12, 5)])
    batch = make(case, torch.float32)
    if wrong == "table":
        batch.tables[1, 2] = batch.k_cache.shape[0]
    elif wrong == "context":
        batch.contexts[1] = 4
    elif wrong == "starts":
        batch.starts[2] = 7
    else:
        batch.contexts[1] = 4 * batch.tables.shape[1] + 1
    with pytest.raises(IndexError, match="points outside"):
        batch.run(case)
    k, v = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    for place in (-1, 4 * batch.k_cache.shape[0]):
        with pytest.raises(IndexError, match="outside of the cache"):
            store_kv_(batch.k_cache, batch.v_cache, k, v, torch.tensor([place]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 100])
def test_store_copies_bits_to_their_places_and_nothing_else(
    isa: str, tokens: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    k_cache = torch.full((33, 4, 2, 6), NAN, dtype=dtype)
    v_cache = torch.full((33, 4, 2, 3), NAN, dtype=dtype)
    k = torch.randn(2, tokens, 6, generator=generator).to(dtype).transpose(0, 1)
    v = torch.randn(tokens, 2, 4, generator=generator).to(dtype)[..., 1:]
    places = torch.randperm(128, generator=generator)[:tokens] + 4
    expected = k_cache.clone().view(-1, 2, 6), v_cache.clone().view(-1, 2, 3)
    expected[0][places], expected[1][places] = k, v
    store_kv_(k_cache, v_cache, k, v, places)
    for got, wanted in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(got.view(wanted.shape).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("sinks", [True, False])
def test_opcheck(isa: str, sinks: bool) -> None:
    attention = (
        torch.randn(6, 4, 8),
        torch.randn(5, 4, 2, 8),
        torch.randn(5, 4, 2, 6),
        torch.tensor([[1, 0], [2, 3]], dtype=torch.int32),
        torch.tensor([3, 7], dtype=torch.int32),
        torch.tensor([0, 1, 6], dtype=torch.int32),
        1,
        0.3,
        4,
        2.0,
        torch.randn(4) if sinks else None,
    )
    store = (
        torch.zeros(3, 4, 2, 8),
        torch.zeros(3, 4, 2, 6),
        torch.randn(3, 2, 8),
        torch.randn(3, 2, 6),
        torch.tensor([4, 9, 6]),
    )
    for operation, arguments in (("paged_attention", attention), ("store_kv_", store)):
        outcome = torch.library.opcheck(getattr(torch.ops.manylora, operation).default, arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome
