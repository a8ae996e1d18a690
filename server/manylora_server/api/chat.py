"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from manylora_server.api.body import read_json
from manylora_server.api.logprobs import chat_logprobs
from manylora_server.api.openapi import json_body
from manylora_server.api.planning import make_plan
from manylora_server.api.prompts import prepare_chat
from manylora_server.api.respond import respond
from manylora_server.api.schemas import ChatCompletionRequest
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Answer, Json
from manylora_server.core.errors import InvalidRequestError
from manylora_server.core.types import RequestOutput, TokenLogprob

if TYPE_CHECKING:
    from manylora_server.model.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    engine = services_of(request).engine
    body = await read_json(request, ChatCompletionRequest)
    max_tokens = _max_tokens(body)
    logprobs = _logprobs(body)
    prompt = await prepare_chat(engine, body.messages)
    plan = make_plan(
        engine,
        body,
        [prompt],
        id_prefix="chatcmpl",
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=logprobs,
    )
    shape = ChatShape(engine.tokenizer, logprobs=logprobs is not None)
    return await respond(request, engine, plan, shape, body)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_tokens: {old} contradicts max_completion_tokens {new}; send one of them.",
            param="max_tokens",
        )
    return new if old is None else old


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError(
            "top_logprobs: it needs logprobs true; send that, or leave it out.",
            param="top_logprobs",
        )
    return None


class ChatShape:
    """OpenAI's ``chat.completion``."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def choice(self, index: int, answer: Answer) -> Json:
        """Return a finished choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
            "logprobs": self._shape_logprobs(answer.logprobs) if self._logprobs else None,
            "finish_reason": answer.final.finish_reason,
        }

    def opening(self, index: int) -> list[Json]:
        """Return the chunk that says who speaks."""
        return [_chunk(index, {"role": "assistant", "content": "", "refusal": None})]

    def delta(self, index: int, output: RequestOutput) -> list[Json]:
        """Return a chunk for new text or log-probabilities, and one of its own for the end."""
        chunks: list[Json] = []
        logprobs = None
        if self._logprobs and output.logprobs:
            logprobs = self._shape_logprobs(output.logprobs)
        if output.text or logprobs is not None:
            chunks.append(_chunk(index, {"content": output.text}, logprobs=logprobs))
        if output.finish_reason is not None:
            chunks.append(_chunk(index, {}, finish_reason=output.finish_reason))
        return chunks

    def _shape_logprobs(self, entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> Json:
        return chat_logprobs(self._tokenizer, entries)


def _chunk(
    index: int, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
) -> Json:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    }
