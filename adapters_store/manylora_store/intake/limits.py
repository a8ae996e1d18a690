"""How much an archive may hold, and make of the bytes it has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an archive, beside the size its contents may have.

    ``n`` compressed bytes may become ``expansion * n + slack_bytes``. Trained weights hardly
    compress at all; deflate can make 1,030 bytes of one.
    """

    members: int = 1000
    expansion: int = 20
    slack_bytes: int = 64 * 2**20

    def expanded(self, compressed: int) -> int:
        """Return how many bytes ``compressed`` bytes may become."""
        return self.expansion * compressed + self.slack_bytes
