"""Token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class Detokenizer:
    """Incremental decoding of one sequence's output.

    The pieces joined are what the tokens add to the prompt's text, cut before the stop string that
    is complete first. A token's text depends on its neighbours (spaces, bytes of one character), so
    each piece is the difference between decoding a short window of tokens with and without the new
    ones; ``context`` is the prompt's end, the first such window.
    """

    def __init__(
        self, decoder: Decoder, stop: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._token_ids = list(context)
        # Decoding restarts at _window; tokens before _read are already in the text.
        self._window = 0
        self._read = len(self._token_ids)
        self._held = ""

    def push(self, token_id: int) -> Piece:
        """Take one token and return the text that is certain now."""
        self._token_ids.append(token_id)
        return self._cut(self._held + self._decode(final=False), final=False)

    def finish(self) -> Piece:
        """Return what was held back; bytes that never became a character are U+FFFD."""
        return self._cut(self._held + self._decode(final=True), final=True)

    def _decode(self, *, final: bool) -> str:
        known = self._decoder.decode(self._token_ids[self._window : self._read])
        text = self._decoder.decode(self._token_ids[self._window :])
        incomplete = text.endswith("�")
        if not final and (incomplete or len(text) <= len(known)):
            return ""
        self._window, self._read = self._read, len(self._token_ids)
        return text[len(known) :]

    def _cut(self, text: str, *, final: bool) -> Piece:
        # The first to be complete counts, so that it does not matter how tokens cut the text; of
        # several that end together the longest, so that nothing of it is shown.
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text
        ]
        if found:
            end, size, stop = min(found)
            self._held = ""
            return Piece(text[: end + size], stop)
        keep = 0 if final else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return Piece(text[: len(text) - keep])

    def _possible_stop(self, text: str) -> int:
        """Return how many characters at the end of ``text`` may be the start of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
