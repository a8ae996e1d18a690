"""From what the client sent to prompts of token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora_server.api.schemas import ChatMessage
from manylora_server.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine
    from manylora_server.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """``text`` is ``None`` where the client sent ids."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def prepare_prompts(
    engine: AsyncEngine, prompt: str | list[int] | list[str] | list[list[int]]
) -> list[PreparedPrompt]:
    """Return the prompts of a completions request, tokenized off the event loop.

    Raises ``InvalidRequestError`` for an empty prompt and for ids the model does not know.
    """
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    items: Sequence[Any] = [prompt] if single else prompt
    prepared = await asyncio.to_thread(lambda: [_prepare(engine.tokenizer, item) for item in items])
    for index, item in enumerate(prepared):
        field = "prompt" if single else f"prompt[{index}]"
        if not item.token_ids:
            raise InvalidRequestError(
                f"{field}: it holds no tokens; at least one is needed.", param=field
            )
        check_token_ids(engine, item.token_ids, field)
    return prepared


async def prepare_chat(
    engine: AsyncEngine, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
) -> PreparedPrompt:
    """Return the prompt that the model's chat template makes of ``messages``."""
    rendered = [_plain(message) for message in messages]
    token_ids = await asyncio.to_thread(
        engine.tokenizer.encode_chat, rendered, add_generation_prompt=add_generation_prompt
    )
    return PreparedPrompt(tuple(token_ids))


def check_token_ids(engine: AsyncEngine, token_ids: Sequence[int], field: str) -> None:
    """Raise ``InvalidRequestError`` for the first id outside the model's vocabulary."""
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < engine.vocab_size:
            raise InvalidRequestError(
                f"{field}[{index}]: {token_id} is not a token id; the model's are 0 to "
                f"{engine.vocab_size - 1}.",
                param=field,
            )


def _prepare(tokenizer: Tokenizer, item: str | list[int]) -> PreparedPrompt:
    if isinstance(item, str):
        return PreparedPrompt(tuple(tokenizer.encode(item)), item)
    return PreparedPrompt(tuple(item))


def _plain(message: ChatMessage) -> dict[str, str]:
    content = message.content
    plain = {
        # Few templates know OpenAI's newer name for the system role.
        "role": "system" if message.role == "developer" else message.role,
        "content": content if isinstance(content, str) else "".join(p.text for p in content),
    }
    if message.name is not None:
        plain["name"] = message.name
    return plain
