"""An engine without a model: the interface of ``AsyncEngine``, and answers that tests can foretell.

Each token is one byte. The base answers ``REPLY``; an adapter says its name first. Only for tests
of the HTTP layer's shapes; whatever depends on computing runs against the real engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manylora_server.core.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    ContextLengthError,
    InvalidRequestError,
    ManyloraError,
    NotReadyError,
    OverloadedError,
)
from manylora_server.core.types import (
    AdapterChoice,
    AdapterMix,
    FinishReason,
    Request,
    RequestOutput,
    TokenLogprob,
)
from manylora_server.engine.limits import EngineLimits
from manylora_server.model.tokenizer import Tokenizer
from manylora_store.errors import AdapterUnsupportedError
from manylora_store.records import AdapterRecord
from support.fake_adapters import FakeAdapterService
from support.fake_exports import FakeExportService

REPLY = "Grüße, world."
BASE = "org/base"
SLOTS = 3


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, then ``<s>`` (256) and ``</s>`` (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    )


def record(name: str, number: int) -> AdapterRecord:
    return AdapterRecord(
        name=name,
        digest=f"{number:08x}" * 8,
        peft_type="LORA",
        rank=4,
        ranks={"model.layers.0.self_attn.q_proj": 4},
        target_modules=("q_proj",),
        parameters=1024,
        bytes=4096,
        base_model=None,
        created_at=1_700_000_000.5 + number,
        source=f"/adapters/{name}",
    )


class FakeCatalog:
    def __init__(self, names: tuple[str, ...]) -> None:
        self._records = {name: record(name, number) for number, name in enumerate(names, 0xA1)}

    def resolve(self, reference: str) -> AdapterChoice:
        name, at, prefix = reference.partition("@")
        if at and (len(prefix) < 8 or set(prefix) - set("0123456789abcdef")):
            raise InvalidRequestError(f"adapter: {prefix!r} is not a digest.", param="adapter")
        found = self._records.get(name)
        if found is None or not found.digest.startswith(prefix):
            raise AdapterNotFoundError(f"adapter: no {reference!r}.", param="adapter")
        return AdapterChoice(name, found.digest)

    def check_mixable(self, mix: AdapterMix) -> None:
        """As the real one: ``dora`` is not linear."""
        dora = self._records.get("dora")
        if dora is not None and not mix.plain and dora.digest in mix.digests:
            raise AdapterRefusedError(AdapterUnsupportedError("adapter: 'dora' cannot be mixed."))

    def get(self, name: str) -> AdapterRecord | None:
        return self._records.get(name)

    def served(self) -> list[tuple[str, str, float]]:
        records = (self._records[name] for name in sorted(self._records))
        return [(record.name, record.digest, record.created_at) for record in records]


@dataclass
class Script:
    """How the engine misbehaves: seconds per token, and how a request ends after some tokens."""

    token_s: float = 0.0
    fail_after: int | None = None
    ending: FinishReason = FinishReason.ERROR
    refusal: ManyloraError | None = None
    crash: Exception | None = None
    cached_tokens: int = 0


@dataclass
class FakeEngine:
    names: tuple[str, ...] = ("alpha", "beta")
    max_model_len: int = 512
    max_unfinished: int = 1000
    script: Script = field(default_factory=Script)
    model_name: str = BASE
    created: int = 1_700_000_000
    vocab_size: int = 258
    ready: bool = True
    dead: bool = False

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()
        self.adapters = FakeCatalog(self.names)
        self.limits = EngineLimits(
            self.max_model_len, self.max_model_len, self.vocab_size, self.max_unfinished, SLOTS
        )
        self.adapter_service = FakeAdapterService()
        self.export_service = FakeExportService()
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: set[str] = set()
        self.most_running = 0
        self._cut_off = False

    def start(self) -> None:
        self.ready = True

    def close(self) -> None:
        self.ready = False

    def warm_up(self) -> None:
        pass

    def validate(self, request: Request) -> None:
        if not self.ready:
            raise NotReadyError("the server is starting.")
        if self.script.refusal is not None:
            raise self.script.refusal
        wanted = len(request.prompt_token_ids) + request.sampling.max_tokens
        if wanted > self.max_model_len:
            raise ContextLengthError(
                f"{wanted} tokens; {self.max_model_len} fit.", param="max_tokens"
            )
        if len(self.running) >= self.max_unfinished:
            raise OverloadedError("the queue is full.")

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        self.validate(request)
        if self.script.crash is not None:
            raise self.script.crash
        self.requests.append(request)
        self.running.add(request.request_id)
        self.most_running = max(self.most_running, len(self.running))
        finished = False
        try:
            for output in self._outputs(request):
                await asyncio.sleep(self.script.token_s)
                current = output
                if self._cut_off:
                    current = replace(output, text="", finish_reason=FinishReason.ABORT)
                elif request.deadline is not None and time.monotonic() > request.deadline:
                    current = replace(output, text="", finish_reason=FinishReason.TIMEOUT)
                finished = current.finish_reason is not None
                if finished:
                    self.running.discard(request.request_id)
                yield current
                if finished:
                    return
        finally:
            self.running.discard(request.request_id)
            if not finished:
                self.aborted.add(request.request_id)

    async def drain(self, timeout_s: float) -> None:
        self.ready = False
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._cut_off = True
        while self.running:
            await asyncio.sleep(0.01)

    def _outputs(self, request: Request) -> list[RequestOutput]:
        sampling = request.sampling
        reply = REPLY if request.adapter is None else f"{request.adapter.label}: {REPLY}"
        ids = self.tokenizer.encode(reply)
        reason = FinishReason.STOP if len(ids) <= sampling.max_tokens else FinishReason.LENGTH
        ids = ids[: sampling.max_tokens]
        limit, error = self.script.fail_after, None
        if limit is not None and limit < len(ids):
            ids, reason = ids[:limit], self.script.ending
            error = "the device is on fire" if reason is FinishReason.ERROR else None
        outputs: list[RequestOutput] = []
        sent = ""
        for count in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count])
            stop = next((stop for stop in sampling.stop if stop in text), None)
            if stop is not None:
                text, reason = text[: text.index(stop)], FinishReason.STOP
            last = stop is not None or count == len(ids)
            if not last:
                # As the real engine: nothing ends within a character or a possible stop string.
                text = sent if sampling.stop else text.rstrip("\N{REPLACEMENT CHARACTER}")
            outputs.append(
                RequestOutput(
                    request_id=request.request_id,
                    text=text[len(sent) :],
                    token_ids=(ids[count - 1],),
                    logprobs=self._logprobs(ids[count - 1], sampling.logprobs),
                    finish_reason=reason if last else None,
                    stop_reason=stop,
                    prompt_tokens=len(request.prompt_token_ids),
                    cached_tokens=self.script.cached_tokens,
                    completion_tokens=count,
                    error=error if last else None,
                )
            )
            sent = text
            if last:
                break
        return outputs

    @staticmethod
    def _logprobs(token_id: int, wanted: int | None) -> tuple[TokenLogprob, ...]:
        if wanted is None:
            return ()
        top = tuple(((token_id + rank) % 256, -0.25 * (rank + 1)) for rank in range(wanted))
        return (TokenLogprob(token_id, -0.25, top),)
