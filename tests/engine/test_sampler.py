"""The sampler against transformers' processors and OpenAI's formulas, by exact distributions.

A token is chosen by inverting the cumulative distribution at one uniform number. With the numbers
``(i + 1/2) / n`` in ``n`` rows each token is chosen ``n`` times its probability, up to one or two.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from manylora_server.core.types import SamplingParams
from manylora_server.model.sampler import Sampled, SamplerState, sample

VOCAB = 50
ROWS = 4000


class Fixed(random.Random):
    """Always draws ``value``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def state(
    draw: float | None = None,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    ends: Sequence[int] = (),
    **params: Any,
) -> SamplerState:
    made = SamplerState.create(SamplingParams(max_tokens=99, **params), prompt, ends)
    if draw is not None:
        made.rng = Fixed(draw)
    for token in output:
        made.accept(token)
    return made


def logits_of(seed: int, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def frequencies(logits: torch.Tensor, rows: int = ROWS, **settings: Any) -> torch.Tensor:
    """Return how often each token is chosen over evenly spread draws."""
    states = [state((i + 0.5) / rows, **settings) for i in range(rows)]
    chosen = sample(logits.repeat(rows, 1), states)
    counts = Counter(choice.token_id for choice in chosen)
    return torch.tensor([counts[token] / rows for token in range(len(logits))])


def assert_distribution(
    got: torch.Tensor, scores: torch.Tensor, rows: int = ROWS, rounding: float = 1e-5
) -> None:
    expected = torch.softmax(scores.double(), dim=-1)
    assert float((got - expected).abs().max()) <= 2 / rows + rounding
    assert not got[expected == 0].any(), "a token that was cut off was chosen"
    surely = expected > 2 / rows
    assert bool((got[surely] > 0).all()), "a token that survives was never chosen"


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k beyond the vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.7},
    "tiny top-p": {"top_p": 0.001},
    "min-p": {"min_p": 0.1},
    "min-p of one": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.5},
    "repetition below one": {"repetition_penalty": 0.6},
    "top-k then top-p": {"top_k": 6, "top_p": 0.6},
    "top-p then min-p": {"top_p": 0.9, "min_p": 0.2},
    "top-k then min-p": {"top_k": 9, "min_p": 0.15},
    "everything": {
        "temperature": 1.4,
        "top_k": 12,
        "top_p": 0.85,
        "min_p": 0.08,
        "repetition_penalty": 1.3,
    },
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_transformers(name: str, seed: int) -> None:
    params = SETTINGS[name]
    prompt, output = [3, 4, 5, 5], [7, 8, 8]
    processors = LogitsProcessorList()
    if "repetition_penalty" in params:
        processors.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "temperature" in params:
        processors.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        processors.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        processors.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        processors.append(MinPLogitsWarper(params["min_p"]))
    logits = logits_of(seed)
    scores = processors(torch.tensor([prompt + output]), logits[None].clone())[0]
    assert_distribution(frequencies(logits, prompt=prompt, output=output, **params), scores)


def test_openai_s_penalties_and_bias() -> None:
    logits = logits_of(5)
    output = [1, 1, 1, 2, 30]
    bias = {4: 3.0, 1: -2.0, 9: -100.0}
    scores = logits.clone()
    counts = Counter(output)
    for token in range(VOCAB):
        scores[token] += bias.get(token, 0.0)
        scores[token] -= counts[token] * 0.4 + float(counts[token] > 0) * 0.9
    got = frequencies(
        logits,
        prompt=[6, 7, 8],
        output=output,
        frequency_penalty=0.4,
        presence_penalty=0.9,
        logit_bias=bias,
    )
    assert_distribution(got, scores)


def test_repetition_comes_before_the_other_penalties_and_bias_before_both() -> None:
    logits = logits_of(6)
    scores = logits.clone()
    scores[3] += 1.5
    scores[3] = scores[3] / 2 if scores[3] > 0 else scores[3] * 2
    scores[3] -= 0.7
    scores[11] = scores[11] / 2 if scores[11] > 0 else scores[11] * 2
    got = frequencies(
        logits,
        prompt=[11],
        output=[3],
        repetition_penalty=2.0,
        presence_penalty=0.7,
        logit_bias={3: 1.5},
    )
    assert_distribution(got, scores)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_masks_the_ends(temperature: float) -> None:
    logits = torch.zeros(VOCAB)
    logits[[2, 3]] = 50.0
    settings = {"ends": [2, 3], "min_tokens": 2, "temperature": temperature}
    for output, allowed in (([], False), ([5], False), ([5, 6], True)):
        chosen = frequencies(logits, 100, output=output, **settings)
        assert (float(chosen[[2, 3]].sum()) > 0) == allowed


@pytest.mark.parametrize("draw", [0.0, 5e-324, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.99999}, {"min_p": 1e-9}])
def test_extreme_draws_never_choose_the_impossible(settings: dict[str, Any], draw: float) -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [10, 20, 30]] = torch.tensor([0.0, -1.0, 1.0])
    assert sample(logits, [state(draw, **settings)])[0].token_id in (10, 20, 30)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-38, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float, settings: dict[str, Any]) -> None:
    logits = logits_of(7)
    best = int(logits.argmax())
    got = frequencies(logits, 50, temperature=temperature, **settings)
    assert float(got[best]) == 1.0


def test_seeded_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.3, 0.05, 0.15, 0.2, 0.1, 0.02, 0.08, 0.1]))
    seeded = state(seed=11)
    draws = 5000
    counts = Counter(sample(logits[None].clone(), [seeded])[0].token_id for _ in range(draws))
    chi = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(logits.exp()))
    # 24.3 is exceeded once in a thousand at seven degrees of freedom.
    assert 0.3 < float(chi) < 24.3


def test_logprobs_are_of_the_untouched_distribution() -> None:
    logits = logits_of(8)
    expected = torch.log_softmax(logits, dim=-1)
    for alternatives, settings in (
        (0, {"temperature": 0.0}),
        (3, {"temperature": 0.5, "top_k": 2}),
        (VOCAB + 9, {"logit_bias": {4: 90.0}, "frequency_penalty": 1.0, "min_tokens": 3}),
    ):
        got = sample(
            logits[None].clone(),
            [state(0.4, output=[4], ends=[1], logprobs=alternatives, **settings)],
        )[0]
        assert got.logprob is not None
        assert got.logprob.token_id == got.token_id
        assert got.logprob.logprob == pytest.approx(float(expected[got.token_id]))
        best = expected.sort(descending=True)
        count = min(alternatives, VOCAB)
        assert [token for token, _ in got.logprob.top] == best.indices[:count].tolist()
        assert [p for _, p in got.logprob.top] == pytest.approx(best.values[:count].tolist())
    assert sample(logits[None].clone(), [state(0.4)]) == [Sampled(got_token(logits), None)]


def got_token(logits: torch.Tensor) -> int:
    """Return the token at 0.4 of the cumulative distribution."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    return int((cumulative <= 0.4).sum())
