"""``POST /v1/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from manylora_server.api.body import read_json
from manylora_server.api.logprobs import completion_logprobs
from manylora_server.api.openapi import json_body
from manylora_server.api.planning import Plan, make_plan
from manylora_server.api.prompts import prepare_prompts
from manylora_server.api.respond import respond
from manylora_server.api.schemas import CompletionRequest
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Answer, Json
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.types import RequestOutput

if TYPE_CHECKING:
    from manylora_server.model.tokenizer import Tokenizer

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one or more prompts."""
    engine = services_of(request).engine
    body = await read_json(request, CompletionRequest)
    _check(body)
    prompts = await prepare_prompts(engine, body.prompt)
    plan = make_plan(
        engine,
        body,
        prompts,
        id_prefix="cmpl",
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )
    shape = CompletionShape(
        engine.tokenizer, plan, echo=body.echo, logprobs=body.logprobs is not None
    )
    return await respond(request, engine, plan, shape, body)


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequestError(
            f"best_of: {body.best_of} came; only the value of n, {body.n}, is supported.",
            param="best_of",
        )
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError(
            "echo: it cannot be combined with logprobs; leave out one of them.", param="echo"
        )


class CompletionShape:
    """OpenAI's ``text_completion``; its chunks look like the whole."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, plan: Plan, *, echo: bool, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._plan = plan
        self._echo = echo
        self._logprobs = logprobs
        # Where the next token of each streamed choice starts in its text.
        self._offsets = [0] * len(plan.requests)

    def choice(self, index: int, answer: Answer) -> Json:
        """Return a finished choice."""
        logprobs = None
        if self._logprobs:
            logprobs, _ = completion_logprobs(self._tokenizer, answer.logprobs, 0)
        return {
            "text": self._prompt_text(index) + "".join(answer.texts),
            "index": index,
            "logprobs": logprobs,
            "finish_reason": answer.final.finish_reason,
        }

    def opening(self, index: int) -> list[Json]:
        """Return the prompt where it is to be echoed."""
        if not self._echo:
            return []
        text = self._prompt_text(index)
        return [{"text": text, "index": index, "logprobs": None, "finish_reason": None}]

    def delta(self, index: int, output: RequestOutput) -> list[Json]:
        """Return one chunk, or none while the text is held back."""
        wants_logprobs = self._logprobs and output.logprobs
        if not output.text and not wants_logprobs and output.finish_reason is None:
            return []
        logprobs = None
        if wants_logprobs:
            logprobs, self._offsets[index] = completion_logprobs(
                self._tokenizer, output.logprobs, self._offsets[index]
            )
        return [
            {
                "text": output.text,
                "index": index,
                "logprobs": logprobs,
                "finish_reason": output.finish_reason,
            }
        ]

    def _prompt_text(self, index: int) -> str:
        if not self._echo:
            return ""
        prompt = self._plan.prompt_of(index)
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids)
