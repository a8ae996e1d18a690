"""The shared nouns: what a request asks for and what comes back (DESIGN section 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal

Precision = Literal["bf16", "int8", "nf4"]


class FinishReason(StrEnum):
    """Why a request ended; ``STOP`` and ``LENGTH`` are OpenAI's, the others end in an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


class Readiness(Enum):
    """Whether an adapter's rows can be computed now: it is on the device, on its way to it, or
    waits in host memory for a slot."""

    READY = "ready"
    LOADING = "loading"
    NO_ROOM = "no room"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops.

    Logits are changed in this order: logit bias; repetition penalty (over prompt and output);
    presence and frequency penalties (over the output); ``min_tokens`` masks the stop tokens;
    division by ``temperature``; then top-k, top-p and min-p restrict the distribution, each over
    the renormalised result of the one before (the order of transformers). ``temperature == 0`` is
    greedy and ignores the last three.
    ``logprobs`` is the number of most likely alternatives to report (of the distribution before
    temperature and truncation), ``None`` for none at all. ``seed`` makes a request's draws
    reproducible whatever else is in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """The adapter revision a request resolved to; fixed for the request's whole life.

    ``epoch`` is the catalogue's: how many names had been removed when this was resolved.
    """

    name: str
    digest: str
    epoch: int = field(default=0, compare=False)


MIX_LABEL = "_mix"


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """One request's adapters, whose weighted effects are summed: ``W x + sum w_i s_i B_i A_i x``.

    ``members`` are as the client listed them. ``terms`` are what is computed, ``(digest, weight)``
    by digest: the weights of one content under several names are added up, and what has no weight
    is left out. So neither the order nor the names change the numbers, and a mix without terms is
    the base.
    """

    members: tuple[tuple[AdapterChoice, float], ...]
    terms: tuple[tuple[str, float], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        weights: dict[str, list[float]] = {}
        for choice, weight in self.members:
            weights.setdefault(choice.digest, []).append(weight)
        sums = ((digest, math.fsum(parts)) for digest, parts in sorted(weights.items()))
        object.__setattr__(self, "terms", tuple(term for term in sums if term[1] != 0.0))

    @classmethod
    def of(cls, choice: AdapterChoice) -> AdapterMix:
        """Return ``choice`` alone, as it is."""
        return cls(((choice, 1.0),))

    @property
    def choices(self) -> tuple[AdapterChoice, ...]:
        """The revisions that the request uses; each once."""
        return tuple(dict.fromkeys(choice for choice, _ in self.members))

    @property
    def digests(self) -> tuple[str, ...]:
        """The adapters that must be on the device, in the order of ``terms``."""
        return tuple(digest for digest, _ in self.terms)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights, in the order of ``terms``."""
        return tuple(weight for _, weight in self.terms)

    @property
    def plain(self) -> bool:
        """Whether it is one adapter as it is, or the base."""
        return not self.terms or self.weights == (1.0,)

    @property
    def key(self) -> str | None:
        """What is computed, in one word: a digest; digests with weights; ``None`` for the base."""
        if self.plain:
            return self.terms[0][0] if self.terms else None
        return "+".join(f"{digest}*{weight.hex()}" for digest, weight in self.terms)

    @property
    def label(self) -> str:
        """The adapter's name; one word for all mixes of several, of which there is no end."""
        return self.members[0][0].name if len(self.members) == 1 else MIX_LABEL


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted generation request; ``adapter`` is ``None`` for the base.

    ``deadline`` is on the clock of ``time.monotonic`` (seconds). A higher ``priority`` is
    scheduled first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterMix | None = None
    priority: int = 0
    deadline: float | None = None
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one sampled token and of the most likely alternatives (nats)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request.

    ``text`` is only new text; it never ends within a character or a possible stop string, so
    it may be empty though tokens came. The last output of a request, and only that one, has a
    ``finish_reason``; ``error`` is set where that is ``ERROR``. ``stop_reason`` is the stop string
    or stop token id that ended it, ``None`` for end-of-sequence and length.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
