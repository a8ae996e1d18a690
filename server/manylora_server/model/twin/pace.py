"""How much work fits between two steps without being felt. Knows no tensors."""

from __future__ import annotations

from collections import deque
from statistics import median

# Of an ordinary step: what is done between two may lengthen their distance by so much.
SHARE = 0.25
# A piece that is larger than it should be must still leave the distance below one and a half.
MOST = 0.4
_SHORTEST_S = 0.0003
# Where nobody waits for a step; what comes meanwhile waits as long.
IDLE_S = 0.02
_REMEMBERED = 32
_FIRST_RATE = 2e7
_PANEL = 16


class Pace:
    """Sizes pieces of work by what steps and earlier pieces took."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._rate = _FIRST_RATE
        self.budget = IDLE_S

    def note_step(self, seconds: float) -> None:
        """Take note of what a step took."""
        self._steps.append(seconds)

    @property
    def step(self) -> float | None:
        """What an ordinary step takes, ``None`` before any."""
        return median(self._steps) if self._steps else None

    def begin(self, *, idle: bool) -> float:
        """Set and return the seconds for what is done before the next step."""
        step = self.step
        self.budget = IDLE_S if idle or step is None else max(_SHORTEST_S, SHARE * step)
        return self.budget

    def rows(self, columns: int) -> int:
        """Return how many rows of a weight to do at once: whole panels, at least one."""
        # Half of it, so that what is left of a budget holds another piece.
        count = int(0.5 * self.budget * self._rate / columns)
        return max(_PANEL, count // _PANEL * _PANEL)

    def took(self, weights: int, seconds: float) -> None:
        """Take note of a piece."""
        measured = weights / max(seconds, 1e-6)
        self._rate = min(measured, 0.5 * (self._rate + measured))
