"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request

from manylora_server.api.body import read_json
from manylora_server.api.openapi import json_body
from manylora_server.api.prompts import check_token_ids, prepare_chat
from manylora_server.api.schemas import DetokenizeRequest, TokenizeRequest
from manylora_server.api.selection import resolve_model
from manylora_server.api.services import services_of
from manylora_server.api.shapes import Json
from manylora_server.core.errors import InvalidRequestError

router = APIRouter()


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request) -> Json:
    """Return the token ids of a text, or of a conversation under the chat template."""
    engine = services_of(request).engine
    body = await read_json(request, TokenizeRequest)
    resolve_model(engine, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("prompt: send either prompt or messages.", param="prompt")
    if body.messages is not None:
        prepared = await prepare_chat(
            engine, body.messages, add_generation_prompt=body.add_generation_prompt
        )
        tokens = list(prepared.token_ids)
    else:
        assert body.prompt is not None
        tokens = await asyncio.to_thread(
            engine.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
        )
    return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len}


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request) -> Json:
    """Return the text of token ids, special tokens included."""
    engine = services_of(request).engine
    body = await read_json(request, DetokenizeRequest)
    resolve_model(engine, body.model)
    check_token_ids(engine, body.tokens, "tokens")
    text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}
