"""Text to token ids and back, and chat messages to a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora_server.core.errors import InvalidRequestError, StartupError

# For tokenizers that bring none: roles as headings, so that base models see plain text.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

# SentencePiece's names of single bytes.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_symbols() -> dict[str, int]:
    """Return the characters by which byte-level BPE (GPT-2) writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }


_BYTE_OF = _byte_symbols()


class Tokenizer:
    """A thread-safe view of a Hugging Face fast tokenizer.

    ``encode`` adds the special tokens that the tokenizer's own post-processor adds (such as a
    beginning-of-sequence token); chat prompts get only those that the template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a local folder; ``StartupError`` if it cannot be.

        A ``tokenizer.json`` is taken as it is: the class named in ``tokenizer_config.json`` may
        rebuild the tokenizer from its vocabulary and disagree with the file.
        """
        kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        try:
            tokenizer = kind.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise StartupError(f"MODEL {str(folder)!r}: no tokenizer: {error}") from error
        if not tokenizer.is_fast:
            raise StartupError(
                f"MODEL {str(folder)!r}: it has only a slow tokenizer "
                f"({type(tokenizer).__name__}); a tokenizer.json is needed."
            )
        return cls(tokenizer)

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence id, if it has one."""
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer brings a chat template of its own."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``; bytes that form no character become U+FFFD."""
        text: str = self._tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for, also where they are part of a character.

        A token of which neither the text nor the bytes are known gives those of its name.
        """
        text = self.decode([token_id], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        name: str = self._tokenizer.convert_ids_to_tokens(token_id)
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(match[1])
        if all(symbol in _BYTE_OF for symbol in name):
            return bytes(_BYTE_OF[symbol] for symbol in name)
        return name.encode()

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Render ``messages`` with the chat template and return the prompt's ids.

        Raises ``InvalidRequestError`` (param ``messages``) where the template refuses them, for
        example because roles do not alternate.
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=None if self.has_chat_template else DEFAULT_CHAT_TEMPLATE,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"messages: the model's chat template cannot render them: {error}",
                param="messages",
            ) from error
        # A template of the model's own writes its special tokens itself.
        return self.encode(text, add_special_tokens=not self.has_chat_template)
