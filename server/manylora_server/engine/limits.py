"""What a request must fit to be accepted."""

from __future__ import annotations

from dataclasses import dataclass

from manylora_server.core.errors import ContextLengthError, InvalidRequestError, OverloadedError
from manylora_server.core.types import Request


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Tokens of prompt and output together, requests unfinished at the same time, and slots."""

    max_model_len: int
    max_cached_tokens: int
    vocab_size: int
    max_unfinished: int
    adapter_slots: int

    def check(
        self, request: Request, unfinished: int, pinned: frozenset[str] = frozenset()
    ) -> None:
        """Raise the ``ManyloraError`` for which ``request`` cannot be accepted, if any.

        ``pinned`` are the adapters whose slots are not to be had.
        """
        prompt = len(request.prompt_token_ids)
        if prompt == 0:
            raise InvalidRequestError(
                "prompt: it holds no tokens; at least one is needed.", param="prompt"
            )
        wanted = request.sampling.max_tokens
        if prompt + wanted > self.max_model_len:
            raise ContextLengthError(
                f"prompt and max_tokens: {prompt} prompt tokens and {wanted} new ones make "
                f"{prompt + wanted}; the model's context is {self.max_model_len} tokens.",
                param="max_tokens" if prompt < self.max_model_len else "prompt",
            )
        if prompt + wanted > self.max_cached_tokens:
            raise ContextLengthError(
                f"prompt and max_tokens: {prompt + wanted} tokens do not fit the KV cache of "
                f"{self.max_cached_tokens} tokens; ask for fewer, or start the server with a "
                "larger --kv-cache-memory.",
                param="max_tokens",
            )
        digests = () if request.adapter is None else request.adapter.digests
        if len(digests) > 1:
            self.check_members(len(digests))
            if len(pinned.union(digests)) > self.adapter_slots:
                raise OverloadedError(
                    f"adapter: the mix needs {len(digests)} of the "
                    f"{self.adapter_slots} adapter slots at once, and too many are pinned to "
                    "others; try again later, or unpin one.",
                    param="adapter",
                )
        if unfinished >= self.max_unfinished:
            raise OverloadedError(
                f"{self.max_unfinished} requests are running or waiting; try again later."
            )

    def check_members(self, count: int) -> None:
        """Raise ``InvalidRequestError`` for a mix of more adapters than can be on the device."""
        if count > self.adapter_slots:
            raise InvalidRequestError(
                f"adapter: a mix of {count} adapters; at most {self.adapter_slots} are on the "
                "device at once. Name fewer, or start the server with more --adapter-slots.",
                param="adapter",
            )
