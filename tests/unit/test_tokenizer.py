"""The tokenizer's own additions: bytes of single tokens, the default chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from manylora_server.core.errors import InvalidRequestError, StartupError
from manylora_server.model.tokenizer import Tokenizer
from support.models import build_tokenizer


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = Tokenizer(build_tokenizer())
    ids = tokenizer.encode("aé€ \n")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "aé€ \n".encode()
    assert all(len(tokenizer.token_bytes(i)) == 1 for i in ids)


def test_bytes_of_sentencepiece_byte_tokens() -> None:
    raw = RawTokenizer(models.WordLevel({"<unk>": 0, "<0xE2>": 1, "hi": 2}, unk_token="<unk>"))
    raw.decoder = decoders.ByteFallback()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert tokenizer.token_bytes(1) == b"\xe2"
    assert tokenizer.token_bytes(2) == b"hi"


def test_chat_without_a_template_is_plain_headings() -> None:
    tokenizer = Tokenizer(build_tokenizer())
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(ids) == "User: Hello\nAssistant:"


def test_a_template_s_refusal_names_the_field() -> None:
    raw = build_tokenizer()
    raw.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError) as caught:
        Tokenizer(raw).encode_chat([{"role": "user", "content": "Hello"}])
    assert caught.value.param == "messages"
    assert "roles must alternate" in caught.value.message


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(StartupError, match="tokenizer"):
        Tokenizer.from_folder(tmp_path)
