"""What the two generating endpoints share: the envelope, usage and the shape's interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from manylora_server.api.planning import Plan
from manylora_server.core.types import AdapterMix, RequestOutput, TokenLogprob

Json = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """Everything one request yielded; ``last`` is its final output."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in the request's next output."""
        self.texts.append(output.text)
        self.logprobs.extend(output.logprobs)
        if output.finish_reason is not None:
            self.last = output

    @property
    def final(self) -> RequestOutput:
        """The final output of a finished request."""
        assert self.last is not None, "the request has not finished"
        return self.last


class Shape(Protocol):
    """How an endpoint writes its choices. One instance serves one call."""

    object_name: str
    chunk_object_name: str

    def choice(self, index: int, answer: Answer) -> Json:
        """Return a finished choice."""

    def opening(self, index: int) -> list[Json]:
        """Return what a stream starts a choice with, one chunk each."""

    def delta(self, index: int, output: RequestOutput) -> list[Json]:
        """Return what ``output`` adds to a streamed choice, one chunk each."""


def envelope(plan: Plan, object_name: str, choices: list[Json]) -> Json:
    """Return a response or chunk around ``choices``."""
    return {
        "id": plan.response_id,
        "object": object_name,
        "created": plan.created,
        "model": plan.selection.model,
        "adapter": adapter_field(plan.selection.adapter),
        "choices": choices,
    }


def adapter_field(mix: AdapterMix | None) -> list[Json] | None:
    """Return the adapters that answered, with their weights as sent; ``None`` for the base."""
    if mix is None:
        return None
    return [
        {"name": choice.name, "digest": choice.digest, "weight": weight}
        for choice, weight in mix.members
    ]


def usage(plan: Plan, finals: Sequence[RequestOutput]) -> Json:
    """Return the tokens of the whole call; ``finals`` are the final outputs in index order.

    A prompt counts once however many samples continue it, and as cached only as far as it was
    for all of them.
    """
    prompt_tokens = sum(len(prompt.token_ids) for prompt in plan.prompts)
    completion_tokens = sum(final.completion_tokens for final in finals)
    cached_tokens = sum(
        min(final.cached_tokens for final in finals[start : start + plan.samples])
        for start in range(0, len(finals), plan.samples)
    )
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
