"""Log-probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from manylora_server.core.types import TokenLogprob

if TYPE_CHECKING:
    from manylora_server.model.tokenizer import Tokenizer

# A log-probability of minus infinity has no JSON; OpenAI writes this for "next to impossible".
_LOWEST = -9999.0


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return the text of one token by itself; a part of a character gives U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat choice."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top
                ],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob], offset: int
) -> tuple[dict[str, Any], int]:
    """Return the ``logprobs`` of a completions choice and the offset after its last token.

    ``offset`` is where the first token starts in the choice's text, in characters.
    """
    tokens = [token_text(tokenizer, entry.token_id) for entry in entries]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top: list[dict[str, float]] = []
    for token, entry in zip(tokens, entries, strict=True):
        alternatives: dict[str, float] = {}
        # Different tokens may share a text (parts of characters): the likelier one counts.
        for token_id, logprob in entry.top:
            alternatives.setdefault(token_text(tokenizer, token_id), _finite(logprob))
        alternatives.setdefault(token, _finite(entry.logprob))
        top.append(alternatives)
    shape = {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return shape, offset


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
