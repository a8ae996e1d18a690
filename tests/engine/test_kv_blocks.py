"""The block allocator: sharing, eviction order, and a check that finds planted corruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora_server.core.types import AdapterChoice, AdapterMix, Request, SamplingParams
from manylora_server.engine import sequence as engine_sequence
from manylora_server.engine.kv_blocks import KVBlocks

BLOCK = 4


def make(
    tokens: Sequence[int], digest: str | dict[str, float] | None = None
) -> engine_sequence.Sequence:
    adapter = None
    if digest is not None:
        weights = {digest: 1.0} if isinstance(digest, str) else digest
        adapter = AdapterMix(tuple((AdapterChoice("name", d), w) for d, w in weights.items()))
    return engine_sequence.Sequence(Request("id", tuple(tokens), SamplingParams(1), adapter))


def compute(blocks: KVBlocks, sequence: engine_sequence.Sequence) -> None:
    """Let ``sequence`` have all its tokens' keys and values."""
    assert blocks.admit(sequence)
    sequence.computed = len(sequence.token_ids)
    blocks.commit(sequence)


def cached_after(first: tuple[Sequence[int], Any], second: tuple[Sequence[int], Any]) -> int:
    """Return how many tokens of ``second`` are found after ``first`` was computed."""
    blocks = KVBlocks(32, BLOCK)
    early, late = make(*first), make(*second)
    compute(blocks, early)
    assert blocks.admit(late)
    blocks.check_integrity([early, late])
    shared = late.computed // BLOCK
    assert late.block_table[:shared] == early.block_table[:shared]
    assert not set(late.block_table[shared:]) & set(early.block_table)
    return late.computed


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (range(12), range(12), 8),
        (range(13), range(13), 12),
        (range(12), range(20), 12),
        (range(11), range(20), 8),
        (range(20), range(5), 4),
        (range(20), range(4), 0),
        (range(3), range(9), 0),
        ([0, 1, 2, 3, 9, 9, 9, 9], [0, 1, 2, 3, 8, 8, 8, 8, 1], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 1], 0),
        ([0, 0, 0, 0, 5, 6, 7, 8], [1, 0, 0, 0, 5, 6, 7, 8, 1], 0),
    ],
    ids=str,
)
def test_shares_whole_blocks_of_equal_tokens_and_leaves_one_to_compute(
    first: Sequence[int], second: Sequence[int], expected: int
) -> None:
    assert cached_after((first, None), (second, None)) == expected
    assert cached_after((first, "d" * 64), (second, "d" * 64)) == expected


MIX = {"a": 0.7, "b": 0.3}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *((None, "a"), ("a", None), ("a", "b"), ("a", {"a": 0.5}), ("a", MIX), (None, MIX)),
        *(({"a": 0.3, "b": 0.7}, MIX), ({"a": 0.7, "c": 0.3}, MIX), ({"a": -0.7, "b": 0.3}, MIX)),
        ({"a": 0.7, "b": 0.3000000000000001}, MIX),
    ],
    ids=str,
)
def test_never_shares_between_adapters(first: Any, second: Any) -> None:
    assert cached_after((range(16), first), (range(16), second)) == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *((MIX, {"b": 0.3, "a": 0.7}), ("a", {"a": 1.0}), (None, {"a": 0.0})),
        *(("a", {"a": 1.0, "b": 0.0}), (MIX, {**MIX, "c": -0.0})),
    ],
    ids=str,
)
def test_shares_between_mixes_that_compute_the_same(first: Any, second: Any) -> None:
    assert cached_after((range(16), first), (range(16), second)) == 12


def test_what_is_renewed_is_shared_no_more_and_shares_anew() -> None:
    blocks = KVBlocks(32, BLOCK)
    early = [make(range(12), "a"), make(range(12), "b")]
    for sequence in early:
        compute(blocks, sequence)
    blocks.renew("a")
    fresh, other = make(range(12), "a"), make(range(12), "b")
    assert blocks.admit(fresh)
    assert blocks.admit(other)
    assert (fresh.computed, other.computed) == (0, 8)
    fresh.computed = 12
    blocks.commit(fresh)
    again = make(range(12), "a")
    assert blocks.admit(again)
    assert again.computed == 8
    blocks.check_integrity([*early, fresh, other, again])


def test_nothing_is_shared_where_the_prefix_cache_is_off() -> None:
    blocks = KVBlocks(32, BLOCK, prefix_cache=False)
    early, late = make(range(12)), make(range(12))
    compute(blocks, early)
    assert blocks.admit(late)
    assert late.computed == 0
    blocks.release(early)
    blocks.release(late)
    assert (blocks.cached, blocks.available) == (0, 31)


def test_blocks_are_shared_only_once_computed() -> None:
    blocks = KVBlocks(32, BLOCK)
    early, late = make(range(12)), make(range(12))
    assert blocks.admit(early)
    early.computed = 7
    blocks.commit(early)
    assert blocks.admit(late)
    assert late.computed == 4


def test_tokens_that_were_generated_are_shared_too() -> None:
    blocks = KVBlocks(32, BLOCK)
    early = make(range(6))
    compute(blocks, early)
    for token in (6, 7, 8):
        early.token_ids.append(token)
        assert blocks.extend(early)
        early.computed += 1
        blocks.commit(early)
    late = make(range(12))
    assert blocks.admit(late)
    assert late.computed == 8


def test_the_least_recently_released_prefix_goes_first_and_from_its_end() -> None:
    blocks = KVBlocks(7, BLOCK)
    old, new = make(range(12)), make(range(100, 112))
    compute(blocks, old)
    compute(blocks, new)
    blocks.release(old)
    blocks.release(new)
    assert (blocks.cached, blocks.available, blocks.used) == (6, 6, 0)
    filler = make(range(200, 208))
    assert blocks.admit(filler)
    blocks.release(filler)
    # Two of the older prefix's blocks went, its last ones; the newer prefix is whole.
    for tokens, expected in ((range(100, 113), 12), (range(13), 4)):
        probe = make(tokens)
        assert blocks.admit(probe)
        assert probe.computed == expected
        blocks.release(probe)


def test_being_used_again_makes_a_prefix_recent() -> None:
    blocks = KVBlocks(7, BLOCK)
    first, second = make(range(12)), make(range(100, 112))
    for sequence in (first, second):
        compute(blocks, sequence)
        blocks.release(sequence)
    again = make(range(12))
    assert blocks.admit(again)
    assert again.computed == 8
    blocks.release(again)
    filler = make(range(200, 212))
    assert blocks.admit(filler)
    blocks.release(filler)
    probe = make(range(9))
    assert blocks.admit(probe)
    assert probe.computed == 8


def test_a_refused_sequence_changes_nothing() -> None:
    blocks = KVBlocks(6, BLOCK)
    early = make(range(12))
    compute(blocks, early)
    blocks.release(early)
    state = repr(vars(blocks))
    late = make(range(24))
    assert not blocks.admit(late)
    assert repr(vars(blocks)) == state
    assert (late.block_table, late.computed) == ([], 0)
    # Two of the five blocks are shared, so three are left for the other twelve tokens.
    fits = make(range(20))
    assert blocks.admit(fits)
    assert (fits.computed, blocks.available) == (12, 0)
    fits.token_ids.append(0)
    assert not blocks.extend(fits)


def plant(name: str) -> Callable[[KVBlocks, engine_sequence.Sequence], object]:
    return {
        "a reference too many": lambda b, s: b._references.__setitem__(s.block_table[0], 2),
        "a reference lost": lambda b, s: b._references.__setitem__(s.block_table[0], 0),
        "a block lost": lambda b, s: b._free.pop(),
        "a block free twice": lambda b, s: b._free.append(b._free[-1]),
        "a block free and used": lambda b, s: b._free.append(s.block_table[0]),
        "block 0 given out": lambda b, s: s.block_table.append(0),
        "a table that forgot a block": lambda b, s: s.block_table.pop(),
        "a prefix that leads to another block": lambda b, s: b._block_of.__setitem__(
            next(iter(b._block_of)), 9
        ),
        "a cached block that nobody can find": lambda b, s: b._cached.__setitem__(
            b._free.pop(), None
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "a reference too many",
        "a reference lost",
        "a block lost",
        "a block free twice",
        "a block free and used",
        "block 0 given out",
        "a table that forgot a block",
        "a prefix that leads to another block",
        "a cached block that nobody can find",
    ],
)
def test_the_check_finds_planted_corruption(name: str) -> None:
    blocks = KVBlocks(16, BLOCK)
    sequence = make(range(14))
    compute(blocks, sequence)
    blocks.check_integrity([sequence])
    plant(name)(blocks, sequence)
    with pytest.raises(AssertionError):
        blocks.check_integrity([sequence])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_history_keeps_blocks_whole_and_shares_only_what_is_equal(data: st.DataObject) -> None:
    blocks = KVBlocks(data.draw(st.integers(2, 14)), data.draw(st.sampled_from([1, 3, 4])))
    live: list[engine_sequence.Sequence] = []
    # What each block holds: the adapter and every token up to the block's end.
    content: dict[int, tuple[str | None, tuple[int, ...]]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["admit", "extend", "release"]))
        if action == "admit":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))
            sequence = make(tokens, data.draw(st.sampled_from([None, "a", "b", MIX])))
            if blocks.blocks_for(len(tokens)) > blocks.capacity or not blocks.admit(sequence):
                continue
            assert sequence.computed < len(tokens)
            live.append(sequence)
        elif live:
            sequence = data.draw(st.sampled_from(live))
            if action == "release":
                blocks.release(sequence)
                live.remove(sequence)
                blocks.check_integrity(live)
                continue
            sequence.token_ids.append(data.draw(st.integers(0, 1)))
            if not blocks.extend(sequence):
                sequence.token_ids.pop()
                continue
        else:
            continue
        for index, block in enumerate(sequence.block_table):
            end = (index + 1) * blocks.block_tokens
            prefix = (sequence.content, tuple(sequence.token_ids[:end]))
            if end <= sequence.computed:
                assert content[block] == prefix, "a block with other content was shared"
            elif end <= len(sequence.token_ids):
                content[block] = prefix
            else:
                content.pop(block, None)
        sequence.computed = len(sequence.token_ids)
        blocks.commit(sequence)
        blocks.check_integrity(live)
        assert blocks.used + blocks.available == blocks.capacity
    for sequence in live:
        blocks.release(sequence)
    blocks.check_integrity([])
    assert blocks.available == blocks.capacity
