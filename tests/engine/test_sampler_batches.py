"""What a row gets must not depend on the rows beside it, small vocabulary or large, ties or not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from manylora_server.core.types import SamplingParams
from manylora_server.model.sampler import Sampled, SamplerState, sample

# Far more than the sampler sorts at first.
LARGE = 6000
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.9},
    {"top_k": 2000},
    {"top_p": 0.95},
    {"top_p": 0.1, "min_p": 0.3},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 4.0}},
    {"min_tokens": 5, "logprobs": 2},
    {"temperature": 1.9, "top_p": 0.999, "logprobs": 0},
]


def fresh(settings: dict[str, Any], seed: int) -> SamplerState:
    params = SamplingParams(max_tokens=99, seed=seed, **settings)
    made = SamplerState.create(params, [3, 4], [2])
    made.accept(5)
    made.accept(5)
    return made


def rows_of(vocab: int, *, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab + ties)
    logits = 2 * torch.randn(len(KINDS), vocab, generator=generator)
    # Half of the rows so flat that 1,024 tokens hold little of the mass.
    logits[::2] *= 0.05
    return (logits * 2).round() / 2 if ties else logits


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocab", [7, 320, LARGE])
def test_each_row_gets_what_it_gets_alone(vocab: int, ties: bool) -> None:
    logits = rows_of(vocab, ties=ties)
    for seed in range(12):
        together = sample(logits.clone(), [fresh(kind, seed) for kind in KINDS])
        for row, kind in enumerate(KINDS):
            alone = sample(logits[row : row + 1].clone(), [fresh(kind, seed)])[0]
            assert_same(together[row], alone, (seed, kind))


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_seeds_repeat_in_any_company(ties: bool) -> None:
    logits = rows_of(LARGE, ties=ties)
    rng = random.Random(0)
    settings = {"top_p": 0.8}
    runs = []
    for _ in range(6):
        seeded = fresh(settings, 42)
        tokens = []
        for _ in range(5):
            others = rng.sample(range(len(KINDS)), rng.randint(0, 6))
            states = [fresh(KINDS[other], rng.randrange(1000)) for other in others]
            place = rng.randint(0, len(others))
            states.insert(place, seeded)
            order = [*others[:place], 6, *others[place:]]
            tokens.append(sample(logits[order].clone(), states)[place].token_id)
        runs.append(tokens)
    assert all(run == runs[0] for run in runs)
    assert len(set(runs[0])) > 1


def test_unseeded_rows_differ() -> None:
    logits = torch.zeros(1, LARGE).repeat(8, 1)
    states = [SamplerState.create(SamplingParams(max_tokens=9), [], []) for _ in range(8)]
    assert len({choice.token_id for choice in sample(logits, states)}) > 1


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1500}, {"top_p": 0.7}, {"top_k": 3000, "top_p": 0.5}, {"top_p": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
def test_a_large_vocabulary_keeps_what_transformers_keeps(
    spread: float, settings: dict[str, Any]
) -> None:
    logits = spread * torch.randn(1, LARGE, generator=torch.Generator().manual_seed(3))
    scores = logits.clone()
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(torch.zeros(1, 1), scores)
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(torch.zeros(1, 1), scores)
    ranked = torch.softmax(scores.double(), dim=-1)[0].sort(descending=True, stable=True)
    cumulative = ranked.values.cumsum(dim=0)
    kept = int((ranked.values > 0).sum())
    for draw in [0.0, 0.1, 0.5, 0.9, 0.99, 0.9999]:
        params = SamplingParams(max_tokens=9, **settings)
        state = SamplerState(params, frozenset(), (), _Fixed(draw))
        token = sample(logits.clone(), [state])[0].token_id
        rank = ranked.indices.tolist().index(token)
        assert rank < kept + 1, "a token was chosen that transformers cuts off"
        low = float(cumulative[rank] - ranked.values[rank])
        assert low - 1e-4 <= draw <= float(cumulative[rank]) + 1e-4


@pytest.mark.parametrize("settings", [{"top_k": 10}, {"top_p": 0.5}, {"top_k": 1024}], ids=str)
def test_equal_logits_are_cut_like_transformers_cuts_them(settings: dict[str, Any]) -> None:
    """All tokens tie: top-k keeps all of them, top-p half, and neither only the first sorted."""
    logits = torch.zeros(1, LARGE)
    highest = 0.0
    for draw in (0.0, 0.3, 0.6, 0.9, 0.999):
        params = SamplingParams(max_tokens=9, **settings)
        token = sample(logits.clone(), [SamplerState(params, frozenset(), (), _Fixed(draw))])
        share = 1.0 if "top_k" in settings else settings["top_p"]
        # Equal tokens are taken in the order of their ids.
        assert token[0].token_id == pytest.approx(draw * share * LARGE, abs=3)
        highest = max(highest, token[0].token_id / LARGE)
    assert highest > 0.49


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_disturbs_no_other(bad: float) -> None:
    for vocab in (320, LARGE):
        logits = rows_of(vocab, ties=False)
        clean = sample(logits.clone(), [fresh(kind, 1) for kind in KINDS])
        for row in range(len(KINDS)):
            poisoned = logits.clone()
            poisoned[row] = bad
            got = sample(poisoned, [fresh(kind, 1) for kind in KINDS])
            for other in range(len(KINDS)):
                if other != row:
                    assert_same(got[other], clean[other], (row, other))


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.zeros(0, 9), []) == []


class _Fixed(random.Random):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def assert_same(got: Sampled, expected: Sampled, where: object) -> None:
    assert got.token_id == expected.token_id, where
    assert (got.logprob is None) == (expected.logprob is None)
    if got.logprob is not None and expected.logprob is not None:
        assert got.logprob.logprob == pytest.approx(expected.logprob.logprob)
        assert [t for t, _ in got.logprob.top] == [t for t, _ in expected.logprob.top]
