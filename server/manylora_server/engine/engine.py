"""The synchronous engine: add requests, abort them, and step. One thread owns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch

from manylora_server.adapters.residency import Residency
from manylora_server.adapters.twins.twins import Twins
from manylora_server.core.config import EngineConfig
from manylora_server.core.errors import AdapterLoadError
from manylora_server.core.observer import (
    EngineObserver,
    EngineState,
    FinishedRequest,
    NullObserver,
    StepStats,
)
from manylora_server.core.types import FinishReason, Request, RequestOutput, TokenLogprob
from manylora_server.engine.detokenizer import Decoder, Detokenizer
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.engine.scheduler import Scheduled, Scheduler
from manylora_server.engine.sequence import Sequence
from manylora_server.model.batch import Chunk
from manylora_server.model.sampler import Sampled, SamplerState, sample

logger = logging.getLogger(__name__)

# Enough of the prompt's end to decode the first new token in its context.
_CONTEXT_TOKENS = 8


class Runner(Protocol):
    """Computes a step; see ``model.runner.ModelRunner``."""

    def logits(self, chunks: SequenceOf[Chunk]) -> torch.Tensor:
        """Return float32 ``[n, vocab]``, a row per chunk with ``sample``."""


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    sequence: Sequence
    sampler: SamplerState
    detokenizer: Detokenizer
    end_token_ids: frozenset[int]
    last_token_time: float | None = None


class Engine:
    """Continuous batching over one model. Every added request ends in exactly one last output."""

    def __init__(
        self,
        runner: Runner,
        blocks: KVBlocks,
        residency: Residency,
        decoder: Decoder,
        eos_token_ids: SequenceOf[int],
        max_model_len: int,
        config: EngineConfig,
        twins: Twins,
        observer: EngineObserver | None = None,
    ) -> None:
        self._runner = runner
        self.twins = twins
        # Nobody should go on from keys and values that a twin no longer there has rounded.
        twins.on_dropped = blocks.renew
        self._decoder = decoder
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_model_len = max_model_len
        self.observer = observer or NullObserver()
        self.residency = residency
        self.scheduler = Scheduler(blocks, residency, config.max_batch_tokens, config.max_sequences)
        self._live: dict[str, _Live] = {}
        self._stalled = False
        self._waits = True
        self.state = self._look()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, an adapter on its way to the device, or a merge."""
        return bool(self._live) or self.residency.busy or self.twins.busy

    @property
    def stalled(self) -> bool:
        """Whether the last step had nothing to do: all there is waits for adapters."""
        return self._stalled and self._waits

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Ids of the requests that have not ended."""
        return tuple(self._live)

    def add(self, request: Request) -> None:
        """Queue ``request``, which must already be valid and fit the KV cache."""
        assert request.request_id not in self._live, "request ids must be unique"
        params = request.sampling
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self._eos_token_ids
        sequence = Sequence(request)
        self._live[request.request_id] = _Live(
            sequence=sequence,
            sampler=SamplerState.create(params, request.prompt_token_ids, sorted(ends)),
            detokenizer=Detokenizer(
                self._decoder, params.stop, request.prompt_token_ids[-_CONTEXT_TOKENS:]
            ),
            end_token_ids=frozenset(ends),
        )
        self.scheduler.add(sequence)

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT
    ) -> RequestOutput | None:
        """End a request now and free what it holds; ``None`` if it has already ended."""
        live = self._live.get(request_id)
        return None if live is None else self._end(live, reason)

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request with an error; for failures that no single step can be blamed for."""
        return [
            self._end(live, FinishReason.ERROR, error=message) for live in [*self._live.values()]
        ]

    def step(self) -> list[RequestOutput]:
        """Schedule, run, update. Returns what every request that moved got."""
        self.twins.advance(idle=self._stalled or not self._live)
        start = time.perf_counter()
        preemptions = self.scheduler.preemptions
        outputs = self._expire()
        plan = self.scheduler.schedule()
        outputs += self._failed_loads()
        self._stalled = not plan
        if not plan:
            self.residency.note_step(None)
            self._waits = self.twins.waits
            self.report_state()
            return outputs
        try:
            contents = {scheduled.sequence.content for scheduled in plan}
            tokens = sum(scheduled.count for scheduled in plan)
            twin: Runner | None = self.twins.runner_for(contents, tokens)
            logits = (twin or self._runner).logits([_chunk(scheduled) for scheduled in plan])
            choices = self._choose(plan, logits)
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(plan))
            message = f"the step failed: {type(error).__name__}"
            outputs += [self._fail(scheduled.sequence, message) for scheduled in plan]
            self.report_state()
            return outputs
        outputs += self._update(plan, choices)
        seconds = time.perf_counter() - start
        self.residency.note_step(seconds)
        self.twins.note_step(contents, tokens, seconds)
        preempted = self.scheduler.preemptions - preemptions
        self.observer.on_step(
            StepStats(
                seconds=seconds,
                batch_tokens=tokens,
                distinct_adapters=len({digest for s in plan for digest in s.sequence.adapters}),
                preemptions=preempted,
                merged=twin is not None,
            )
        )
        self.report_state()
        return outputs

    def check_integrity(self) -> None:
        """Assert that nothing is lost or leaked: requests, blocks, slots."""
        scheduler = self.scheduler
        scheduler.check_integrity()
        self.residency.check_integrity(
            [digest for live in self._live.values() for digest in live.sequence.adapters]
        )
        known = {s.request.request_id for s in (*scheduler.waiting, *scheduler.running)}
        assert known == set(self._live), "the scheduler and the engine disagree on what is live"

    def _expire(self) -> list[RequestOutput]:
        now = time.monotonic()
        late = [
            live
            for live in self._live.values()
            if live.sequence.request.deadline is not None and live.sequence.request.deadline <= now
        ]
        return [self._end(live, FinishReason.TIMEOUT) for live in late]

    def _failed_loads(self) -> list[RequestOutput]:
        failed, self.scheduler.failed = self.scheduler.failed, []
        return [self._fail(sequence, _blamed(sequence, error)) for sequence, error in failed]

    def _fail(self, sequence: Sequence, message: str) -> RequestOutput:
        live = self._live[sequence.request.request_id]
        return self._end(live, FinishReason.ERROR, error=message)

    def _choose(
        self, plan: list[Scheduled], logits: torch.Tensor
    ) -> list[tuple[_Live, Sampled, bool]]:
        """Return each complete sequence's next token, and whether its logits were finite."""
        complete = [scheduled.sequence for scheduled in plan if scheduled.completes]
        if not complete:
            return []
        lives = [self._live[sequence.request.request_id] for sequence in complete]
        finite = torch.isfinite(logits.amax(dim=-1)).tolist()
        sampled = sample(logits, [live.sampler for live in lives])
        return list(zip(lives, sampled, finite, strict=True))

    def _update(
        self, plan: list[Scheduled], choices: list[tuple[_Live, Sampled, bool]]
    ) -> list[RequestOutput]:
        for scheduled in plan:
            self.scheduler.advance(scheduled)
        now = time.monotonic()
        # An adapter whose activations overflow must fail its own request and no other.
        return [
            self._accept(live, choice, now)
            if good
            else self._fail(live.sequence, "the model's output is not finite (NaN or overflow)")
            for live, choice, good in choices
        ]

    def _accept(self, live: _Live, choice: Sampled, now: float) -> RequestOutput:
        sequence, params = live.sequence, live.sequence.request.sampling
        token = choice.token_id
        sequence.token_ids.append(token)
        live.sampler.accept(token)
        self._observe_token(live, now)
        logprobs = () if choice.logprob is None else (choice.logprob,)
        if token in live.end_token_ids:
            stop_reason = token if token in params.stop_token_ids else None
            return self._end(live, FinishReason.STOP, (token,), logprobs, stop_reason=stop_reason)
        piece = live.detokenizer.push(token)
        if piece.stop is not None:
            return self._end(
                live, FinishReason.STOP, (token,), logprobs, piece.text, stop_reason=piece.stop
            )
        length = len(sequence.token_ids)
        if sequence.output_length >= params.max_tokens or length >= self._max_model_len:
            return self._end(live, FinishReason.LENGTH, (token,), logprobs, piece.text)
        return RequestOutput(
            request_id=sequence.request.request_id,
            text=piece.text,
            token_ids=(token,),
            logprobs=logprobs,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            completion_tokens=sequence.output_length,
        )

    def _end(
        self,
        live: _Live,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        text: str = "",
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        sequence = live.sequence
        request = sequence.request
        del self._live[request.request_id]
        self.scheduler.finish(sequence)
        if not isinstance(stop_reason, str):
            rest = live.detokenizer.finish()
            text += rest.text
            if rest.stop is not None and reason is FinishReason.LENGTH:
                reason, stop_reason = FinishReason.STOP, rest.stop
        self.observer.on_finish(
            FinishedRequest(
                adapter=None if request.adapter is None else request.adapter.label,
                finish_reason=reason,
                seconds=time.monotonic() - request.arrival,
                prompt_tokens=sequence.prompt_length,
                cached_tokens=sequence.cached_tokens,
                generated_tokens=sequence.output_length,
            )
        )
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            completion_tokens=sequence.output_length,
            error=error,
        )

    def _observe_token(self, live: _Live, now: float) -> None:
        request = live.sequence.request
        adapter = None if request.adapter is None else request.adapter.label
        if live.last_token_time is None:
            self.observer.on_first_token(adapter, now - request.arrival)
        else:
            self.observer.on_inter_token(adapter, now - live.last_token_time)
        live.last_token_time = now

    def report_state(self) -> None:
        """Tell the observer what is held now. ``step`` does; call it when steps stop."""
        self.state = self._look()
        self.observer.on_state(self.state)

    def _look(self) -> EngineState:
        blocks = self.scheduler.blocks
        return EngineState(
            running_sequences=len(self.scheduler.running),
            queue_depth=len(self.scheduler.waiting),
            kv_blocks_used=blocks.used,
            kv_blocks_cached=blocks.cached,
            kv_blocks_free=blocks.available - blocks.cached,
            adapters_on_device=len(self.residency.on_device),
            adapters_on_host=len(self.residency.host),
        )


def _blamed(sequence: Sequence, error: AdapterLoadError) -> str:
    """Return why ``sequence`` fails; of several adapters, which one is at fault."""
    mix = sequence.request.adapter
    members = () if mix is None or len(mix.members) < 2 else mix.choices
    name = next((choice.name for choice in members if choice.digest == error.digest), None)
    return error.message if name is None else f"adapter {name!r}: {error.message}"


def _chunk(scheduled: Scheduled) -> Chunk:
    sequence = scheduled.sequence
    start, end = sequence.computed, sequence.computed + scheduled.count
    return Chunk(
        token_ids=sequence.token_ids[start:end],
        start=start,
        block_table=sequence.block_table,
        adapters=sequence.weighted_slots,
        sample=scheduled.completes,
    )
