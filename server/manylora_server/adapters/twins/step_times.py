"""How long a step takes on either path, by its tokens, and which path to take. Knows no tensors."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any


class StepTimes:
    """Seconds by number of tokens: linear between what was measured, and beyond the last."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        assert seconds, "nothing was measured"
        self.tokens = sorted(seconds)
        self.seconds = [seconds[tokens] for tokens in self.tokens]

    def at(self, tokens: int) -> float:
        """Return what a step of ``tokens`` takes; of fewer than were measured, the fewest's."""
        if len(self.tokens) == 1 or tokens <= self.tokens[0]:
            return self.seconds[0]
        right = min(max(bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        x0, x1 = self.tokens[right - 1], self.tokens[right]
        y0, y1 = self.seconds[right - 1], self.seconds[right]
        slope = (y1 - y0) / (x1 - x0)
        if tokens <= x1:
            return y0 + slope * (tokens - x0)
        # Beyond, more tokens never take less time; noise may have said so.
        return y1 + max(0.0, slope) * (tokens - x1)

    def as_dict(self) -> dict[str, float]:
        """Return milliseconds by number of tokens, JSON-ready."""
        pairs = zip(self.tokens, self.seconds, strict=True)
        return {str(tokens): round(1e3 * seconds, 4) for tokens, seconds in pairs}


class PathChoice:
    """The measured choice between the base with deltas (``fused``) and a twin (``merged``)."""

    def __init__(self, fused: StepTimes, merged: StepTimes) -> None:
        self.fused = fused
        self.merged = merged

    def saved(self, tokens: int) -> float:
        """Return the seconds that the twin saves in a step of ``tokens``; negative: it costs."""
        return self.fused.at(tokens) - self.merged.at(tokens)

    def merged_is_faster(self, tokens: int) -> bool:
        """Whether a step of ``tokens`` is to use the twin."""
        return self.saved(tokens) > 0

    def as_dict(self) -> dict[str, Any]:
        """Return both paths' times, JSON-ready."""
        return {
            "fused_ms": self.fused.as_dict(),
            "merged_ms": self.merged.as_dict(),
            "merged_at": [t for t in self.fused.tokens if self.merged_is_faster(t)],
        }
