"""Chooses the next token of every row of a batch, each by its own parameters, in one go."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from manylora_server.core.types import SamplingParams, TokenLogprob

# Top-p needs tokens in order of probability. Almost always few of them hold the mass, so this many
# are sorted first and all of them only where that was not enough.
_FIRST_CANDIDATES = 1024
_COLDEST = torch.finfo(torch.float32).tiny


@dataclass(slots=True)
class SamplerState:
    """What one request's sampling remembers between steps.

    ``end_token_ids`` are masked until ``min_tokens`` tokens came. One uniform number is drawn
    from ``rng`` per token, so a seeded request repeats whatever else is in the batch.
    """

    params: SamplingParams
    prompt_tokens: frozenset[int]
    end_token_ids: tuple[int, ...]
    rng: random.Random
    output_counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def create(
        cls, params: SamplingParams, prompt: Sequence[int], end_token_ids: Sequence[int]
    ) -> SamplerState:
        """Return the state before the first token."""
        tokens = frozenset(prompt) if params.repetition_penalty != 1.0 else frozenset()
        return cls(params, tokens, tuple(end_token_ids), random.Random(params.seed))

    def accept(self, token_id: int) -> None:
        """Take note of the request's next token."""
        self.output_counts[token_id] += 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's choice."""

    token_id: int
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """Return one token per row of the float32 ``logits [n, vocab]``, which may be changed.

    The order of the steps is documented at ``SamplingParams``.
    """
    logprobs = _logprob_rows(logits, states)
    _apply_bias(logits, states)
    _apply_penalties(logits, states)
    _mask_ends(logits, states)
    tokens = torch.argmax(logits, dim=-1).tolist()
    for rows, truncated in ((_drawn(states, False), False), (_drawn(states, True), True)):
        if rows:
            chosen = [states[row] for row in rows]
            index = torch.tensor(rows, device=logits.device)
            scaled = logits[index]
            # Less its largest value, so that no temperature however small makes a row infinite.
            scaled -= scaled.amax(dim=-1, keepdim=True)
            scaled /= _column([s.params.temperature for s in chosen], logits).clamp_min(_COLDEST)
            draws = _column([s.rng.random() for s in chosen], logits, torch.float64)
            pick = _draw_truncated if truncated else _draw_full
            for row, token in zip(rows, pick(scaled, chosen, draws), strict=True):
                tokens[row] = token
    return [
        Sampled(token, _describe(logprobs, row, token, state.params.logprobs))
        for row, (token, state) in enumerate(zip(tokens, states, strict=True))
    ]


def _drawn(states: Sequence[SamplerState], truncated: bool) -> list[int]:
    return [
        row
        for row, state in enumerate(states)
        if not state.params.greedy
        and (state.params.top_k > 0 or state.params.top_p < 1.0) == truncated
    ]


def _column(
    values: list[float], like: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _apply_bias(logits: torch.Tensor, states: Sequence[SamplerState]) -> None:
    entries = [
        (row, token, bias)
        for row, state in enumerate(states)
        for token, bias in state.params.logit_bias.items()
    ]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        place = (_ids(rows, logits), _ids(tokens, logits))
        logits.index_put_(place, torch.tensor(biases, device=logits.device), accumulate=True)


def _apply_penalties(logits: torch.Tensor, states: Sequence[SamplerState]) -> None:
    entries = [
        (row, token, state.output_counts[token], state.params)
        for row, state in enumerate(states)
        if state.params.has_penalties
        for token in state.prompt_tokens | state.output_counts.keys()
    ]
    if not entries:
        return
    place = (_ids([e[0] for e in entries], logits), _ids([e[1] for e in entries], logits))
    repetition = torch.tensor([e[3].repetition_penalty for e in entries], device=logits.device)
    additive = torch.tensor(
        [e[3].frequency_penalty * e[2] + e[3].presence_penalty * (e[2] > 0) for e in entries],
        device=logits.device,
    )
    values = logits[place]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[place] = values - additive


def _mask_ends(logits: torch.Tensor, states: Sequence[SamplerState]) -> None:
    for row, state in enumerate(states):
        if state.output_counts.total() < state.params.min_tokens and state.end_token_ids:
            logits[row, list(state.end_token_ids)] = -math.inf


def _ids(values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _draw_full(
    logits: torch.Tensor, states: Sequence[SamplerState], draws: torch.Tensor
) -> list[int]:
    """Draw from all tokens, less those under min-p."""
    min_p = [state.params.min_p for state in states]
    if any(min_p):
        floors = _column([math.log(p) if p else -math.inf for p in min_p], logits)
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + floors, -math.inf)
    return _inverse_cdf(torch.softmax(logits, dim=-1), draws)


def _draw_truncated(
    logits: torch.Tensor, states: Sequence[SamplerState], draws: torch.Tensor
) -> list[int]:
    """Draw from the tokens that top-k, then top-p, then min-p leave."""
    chosen, certain = _draw_largest(logits, states, draws, _FIRST_CANDIDATES)
    rows = [row for row, sure in enumerate(certain) if not sure]
    if rows:
        index = _ids(rows, logits)
        rest = [states[row] for row in rows]
        again, _ = _draw_largest(logits[index], rest, draws[index], logits.shape[1])
        for row, token in zip(rows, again, strict=True):
            chosen[row] = token
    return chosen


def _draw_largest(
    logits: torch.Tensor, states: Sequence[SamplerState], draws: torch.Tensor, count: int
) -> tuple[list[int], list[bool]]:
    """Draw as ``_draw_truncated`` where no more than ``count`` tokens remain.

    The second list says for which rows that is certain.
    """
    vocabulary = logits.shape[1]
    top_k = [state.params.top_k or vocabulary for state in states]
    top_p = _column([state.params.top_p for state in states], logits)
    min_p = _column([state.params.min_p for state in states], logits)
    values, tokens = _largest(logits, count)
    limits = _ids([min(k, values.shape[1]) - 1 for k in top_k], logits)
    limited = torch.tensor([[k < vocabulary] for k in top_k], device=logits.device)
    smallest = values.gather(1, limits[:, None])
    kept = ~limited | (values >= smallest)
    inside = torch.logsumexp(values.masked_fill(~kept, -math.inf), dim=-1, keepdim=True)
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    probabilities = torch.exp(values - torch.where(limited, inside, total)) * kept
    before = probabilities.cumsum(dim=-1) - probabilities
    kept &= before < top_p
    kept[:, 0] = True
    kept &= probabilities >= min_p * probabilities[:, :1]
    weights = probabilities * kept
    # Where the last candidate remains, further ones, or ones equal to it, might as well.
    last = values[:, -1:]
    remains = ((weights > 0) & (values == last)).any(dim=-1, keepdim=True)
    open_ended = torch.where(limited, smallest == last, remains)[:, 0]
    places = _inverse_cdf(weights, draws)
    chosen = tokens.gather(1, _ids(places, logits)[:, None])[:, 0].tolist()
    return chosen, [count >= vocabulary or not more for more in open_ended.tolist()]


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's ``count`` largest values and their ids, equal ones in the order of ids.

    ``topk`` orders equal values differently for different counts, which seeded draws would show.
    """
    if count < logits.shape[1]:
        tokens = torch.topk(logits, count, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
        return values, tokens.gather(1, order)
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    return values, tokens


def _inverse_cdf(weights: torch.Tensor, draws: torch.Tensor) -> list[int]:
    """Return per row the first index whose cumulative weight exceeds ``draw * total``."""
    cumulative = weights.double().cumsum(dim=-1)
    places = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    # Rounding can put the threshold on the total itself; the last token with weight is meant then.
    last = (weights.shape[1] - 1) - (weights.flip(-1) > 0).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(places, last)[:, 0].tolist()


def _logprob_rows(logits: torch.Tensor, states: Sequence[SamplerState]) -> dict[int, torch.Tensor]:
    """Return log-softmax of the untouched logits for the rows that report them."""
    rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    if not rows:
        return {}
    values = torch.log_softmax(logits[torch.tensor(rows, device=logits.device)], dim=-1)
    return dict(zip(rows, values, strict=True))


def _describe(
    rows: dict[int, torch.Tensor], row: int, token: int, alternatives: int | None
) -> TokenLogprob | None:
    if alternatives is None:
        return None
    values = rows[row]
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best, tokens = torch.topk(values, min(alternatives, values.numel()))
        top = tuple(zip(tokens.tolist(), best.tolist(), strict=True))
    return TokenLogprob(token, float(values[token]), top)
