"""Incremental decoding: whole characters only, nothing lost, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manylora_server.engine.detokenizer import Detokenizer
from manylora_server.model.tokenizer import Tokenizer
from support.models import build_tokenizer

BROKEN = "\ufffd"


def byte_symbols() -> dict[int, str]:
    """Byte-level BPE's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


TOKENIZER = Tokenizer(build_tokenizer())
_VOCABULARY = build_tokenizer().get_vocab()
ID_OF_BYTE = {byte: _VOCABULARY[symbol] for byte, symbol in byte_symbols().items()}
SPECIAL = st.sampled_from([0, 1, 2])
# Bytes that start, continue or break characters are much more frequent than in text.
BYTES = st.one_of(
    st.integers(0, 255),
    st.sampled_from([0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xEF, 0xBF, 0xBD, 0x61]),
)
TOKENS = st.lists(st.one_of(BYTES.map(ID_OF_BYTE.__getitem__), SPECIAL), max_size=30)
TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé€😀👩\u200d🚀\ufffd\u0301")),
    max_size=12,
)


def ids(text: str) -> list[int]:
    return [ID_OF_BYTE[byte] for byte in text.encode()]


def stream(tokens: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    """Return every piece's text, the last being what ``finish`` gave."""
    detokenizer = Detokenizer(TOKENIZER, (), context)
    pieces = [detokenizer.push(token).text for token in tokens]
    return [*pieces, detokenizer.finish().text]


@given(TEXT, TOKENS)
@example("😀😀😀", [ID_OF_BYTE[0x80], ID_OF_BYTE[0xC3]])
@example("\ufffd", ids("\ufffda"))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_what_the_tokens_add(prompt: str, tokens: list[int]) -> None:
    before = TOKENIZER.decode(ids(prompt))
    assert before == prompt
    expected = TOKENIZER.decode([*ids(prompt), *tokens])[len(before) :]
    # The engine hands over only the prompt's end, which may begin within a character.
    for context in (ids(prompt), ids(prompt)[-8:]):
        assert "".join(stream(tokens, context)) == expected


@given(TEXT, TEXT)
@settings(max_examples=300, deadline=None)
def test_a_split_character_is_never_shown_broken(prompt: str, text: str) -> None:
    tokens = ids(text)
    shown = ""
    for piece in stream(tokens, ids(prompt)[-8:]):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


@given(TEXT.filter(lambda text: BROKEN not in text))
@settings(max_examples=200, deadline=None)
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    for character in text:
        *first, last = ids(character)
        assert [detokenizer.push(token).text for token in first] == [""] * len(first)
        assert detokenizer.push(last).text == character
    assert detokenizer.finish().text == ""


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    assert stream([ID_OF_BYTE[0x61], ID_OF_BYTE[0xF0], ID_OF_BYTE[0x9F]]) == ["a", "", "", BROKEN]


def test_special_tokens_are_left_out() -> None:
    assert stream([*ids("a"), 2, *ids("b"), 0, 1, *ids("é")]) == [
        *("a", "", "b", "", "", "", "é"),
        "",
    ]


class Words:
    """A decoder whose token ``i`` is any text."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self.words[token] for token in token_ids)


def feed(words: Sequence[str], stop: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Return the text shown, the stop string found, and what was shown after each token."""
    detokenizer = Detokenizer(Words(words), stop)
    shown: list[str] = []
    text = ""
    for token in range(len(words)):
        piece = detokenizer.push(token)
        text += piece.text
        shown.append(text)
        if piece.stop is not None:
            return text, piece.stop, shown
    last = detokenizer.finish()
    return text + last.text, last.stop, shown


def first_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first ends the text.

    Of several that end at the same place the longest counts, so that nothing of it is shown.
    """
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("words", "stop", "text", "found"),
    [
        (["hello ", "STOP", " more"], ["STOP"], "hello ", "STOP"),
        (["hello S", "T", "OP more"], ["STOP"], "hello ", "STOP"),
        (["a", "ab", "aba", "b"], ["abab"], "a", "abab"),
        (["xaab", "y"], ["ab", "b"], "xa", "ab"),
        (["ST", "ST", "OP"], ["STOP"], "ST", "STOP"),
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        (["a", "b", "c", "d"], ["abcd", "bc"], "a", "bc"),
        (["one", "\n", "\n", "two"], ["\n\n", "\n"], "one", "\n"),
        (["STO"], ["STOP"], "STO", None),
        (["STOP"], ["STOP"], "", "STOP"),
        (["later ", "b", " then a"], ["a", "b"], "l", "a"),
    ],
)
def test_stop_strings(words: list[str], stop: list[str], text: str, found: str | None) -> None:
    assert feed(words, stop)[:2] == (text, found)


@given(
    st.text("ab\n", max_size=20),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 20), max_size=12),
)
@settings(max_examples=500, deadline=None)
def test_the_first_complete_stop_string_counts_however_tokens_cut_the_text(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    words = [text[a:b] for a, b in pairwise(edges)]
    expected, found = first_stop(text, stop)
    got, got_stop, shown = feed(words, stop)
    assert (got, got_stop) == (expected, found)
    for count, visible in enumerate(shown, start=1):
        arrived = "".join(words[:count])
        assert expected.startswith(visible), "a part of a stop string was shown"
        held = arrived[len(visible) :]
        if len(arrived) <= len(expected):
            assert not held or any(s.startswith(held) for s in stop), "text was held needlessly"
