"""A tokenizer whose text can be read back as token ids, so that answers can be compared exactly."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TOKEN = re.compile(r"<(\d+)>")


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer where token ``i`` is the text ``<i>``; nothing is special or merged.

    A special token would be left out of generated text, so there is none, not even an end.
    """
    vocabulary = {f"<{token}>": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN.pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def token_ids(text: str) -> list[int]:
    """Return the ids that ``text`` was decoded from; ``ValueError`` if it is anything else."""
    ids = [int(match) for match in _TOKEN.findall(text)]
    if "".join(f"<{token}>" for token in ids) != text:
        raise ValueError(f"not the text of whole tokens: {text[:80]!r}")
    return ids
