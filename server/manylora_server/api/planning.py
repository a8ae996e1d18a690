"""From a validated body and its prompts to the engine's requests."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from manylora_server.api.prompts import PreparedPrompt, check_token_ids
from manylora_server.api.schemas import GenerationRequest
from manylora_server.api.selection import Selection, select
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.types import Request, SamplingParams

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Plan:
    """One API call: ``samples`` requests for each prompt, in the order of the choices' index."""

    response_id: str
    created: int
    selection: Selection
    prompts: tuple[PreparedPrompt, ...]
    samples: int
    requests: tuple[Request, ...]

    def prompt_of(self, index: int) -> PreparedPrompt:
        """Return the prompt that the choice ``index`` continues."""
        return self.prompts[index // self.samples]


def make_plan(
    engine: AsyncEngine,
    body: GenerationRequest,
    prompts: Sequence[PreparedPrompt],
    *,
    id_prefix: str,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> Plan:
    """Return the requests for ``body``.

    Without ``max_tokens`` a prompt may be continued by ``default_max_tokens``, or as far as the
    context reaches where that is less (or ``None``). Samples of one prompt differ: the seeds of
    the second and later ones count up from the one given.
    """
    selection = select(engine, body)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options: it is for streams only; send it with stream true or leave it out.",
            param="stream_options",
        )
    response_id = f"{id_prefix}-{uuid.uuid4().hex}"
    arrival = time.monotonic()
    requests: list[Request] = []
    numbers = itertools.count()
    for prompt in prompts:
        limit = max_tokens
        if limit is None:
            # At least one, so that a full context is refused as such.
            room = max(1, engine.max_model_len - len(prompt.token_ids))
            limit = room if default_max_tokens is None else min(room, default_max_tokens)
        sampling = _sampling(engine, body, limit, logprobs)
        requests.extend(
            Request(
                request_id=f"{response_id}-{next(numbers)}",
                prompt_token_ids=prompt.token_ids,
                sampling=_reseeded(sampling, sample),
                adapter=selection.adapter,
                priority=body.priority,
                deadline=None if body.timeout_s is None else arrival + body.timeout_s,
                arrival=arrival,
            )
            for sample in range(body.n)
        )
    return Plan(response_id, int(time.time()), selection, tuple(prompts), body.n, tuple(requests))


def _sampling(
    engine: AsyncEngine, body: GenerationRequest, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    if body.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens that may come.",
            param="min_tokens",
        )
    check_token_ids(engine, body.stop_token_ids, "stop_token_ids")
    bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    check_token_ids(engine, list(bias), "logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(0, body.top_k),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=bias,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
    )


def _reseeded(sampling: SamplingParams, sample: int) -> SamplingParams:
    if sampling.seed is None or sample == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + sample) % 2**63)
