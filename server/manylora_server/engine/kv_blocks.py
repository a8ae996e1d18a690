"""The paged KV cache's blocks: who owns which, and which hold a prefix that can be shared.

A block is *used* (referenced by sequences), *cached* (unreferenced, but its content is a known
prefix; least recently used first to be given away) or *free*. Block 0 is never given out.

Full blocks are known by a chained digest of their tokens, rooted in the adapter's digest, or in
the digests and weights of a mix: two requests share a block only if every token up to its end and
all that its rows are computed with are the same. A name or a slot is never part of it, so a name
that moves to new content cannot find old blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence as SequenceOf

from manylora_server.engine.sequence import Sequence


class KVBlocks:
    """Allocator of ``num_blocks`` blocks (block 0 included) of ``block_tokens`` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks >= 2, "one block is reserved"
        self.block_tokens = block_tokens
        self.capacity = num_blocks - 1
        self._prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, 0, -1))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._editions: Counter[str] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be given out now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Unreferenced blocks whose content may still be reused."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that sequences reference."""
        return self.capacity - self.available

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks ``tokens`` tokens fill."""
        return -(-tokens // self.block_tokens)

    def admit(self, sequence: Sequence) -> bool:
        """Give ``sequence`` blocks for all its tokens, shared ones where its prefix is known.

        Sets ``computed`` to the shared tokens; at least one token is always left to compute, for
        its logits. Returns false, and changes nothing, where there are too few blocks.
        """
        assert not sequence.block_table
        shared = self._match(sequence)
        needed = self.blocks_for(len(sequence.token_ids)) - len(shared)
        spare = self.available - sum(block in self._cached for block in shared)
        if needed > spare:
            return False
        for block in shared:
            self._reference(block)
        sequence.block_table = [*shared, *(self._take() for _ in range(needed))]
        sequence.computed = len(shared) * self.block_tokens
        sequence.committed = len(shared)
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Give ``sequence`` one more block if its tokens need it; false if there is none."""
        if self.blocks_for(len(sequence.token_ids)) <= len(sequence.block_table):
            return True
        if not self.available:
            return False
        sequence.block_table.append(self._take())
        return True

    def commit(self, sequence: Sequence) -> None:
        """Make the full blocks that ``sequence`` has computed known for sharing."""
        if not self._prefix_cache:
            return
        full = sequence.computed // self.block_tokens
        self._extend_hashes(sequence, full)
        for index in range(sequence.committed, full):
            block = sequence.block_table[index]
            digest = sequence.block_hashes[index]
            # Two sequences may compute the same content side by side; the first block keeps it.
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest
        sequence.committed = full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of ``sequence`` back; those known for sharing stay cached."""
        # The last block goes first, so that a prefix is given away from its end.
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        sequence.block_table = []

    def check_integrity(self, sequences: SequenceOf[Sequence]) -> None:
        """Assert that exactly ``sequences`` hold blocks and none is lost or given out twice."""
        held = [0] * len(self._references)
        for sequence in sequences:
            for block in sequence.block_table:
                held[block] += 1
        assert held == self._references, "references and block tables disagree"
        idle = [*self._free, *self._cached]
        assert len(idle) == len(set(idle)), "a block is free twice"
        assert all(self._references[block] == 0 for block in idle)
        assert len(idle) + sum(count > 0 for count in held) == self.capacity, "a block is lost"
        assert held[0] == 0
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of
        assert all(block in self._hash_of for block in self._cached)

    def _match(self, sequence: Sequence) -> list[int]:
        if not self._prefix_cache:
            return []
        shareable = (len(sequence.token_ids) - 1) // self.block_tokens
        self._extend_hashes(sequence, shareable)
        shared = []
        for digest in sequence.block_hashes[:shareable]:
            block = self._block_of.get(digest)
            if block is None:
                break
            shared.append(block)
        return shared

    def renew(self, content: str) -> None:
        """Keep sequences to come from sharing what was computed for ``content`` until now."""
        self._editions[content] += 1

    def _root(self, content: str) -> bytes:
        return f"{content}#{self._editions[content]}".encode()

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes = sequence.block_hashes
        while len(hashes) < count:
            start = len(hashes) * self.block_tokens
            tokens = sequence.token_ids[start : start + self.block_tokens]
            parent = hashes[-1] if hashes else self._root(sequence.content or "base")
            hashes.append(hashlib.sha256(parent + b"|" + array("q", tokens).tobytes()).digest())

    def _reference(self, block: int) -> None:
        self._cached.pop(block, None)
        self._references[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block
