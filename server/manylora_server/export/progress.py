"""How far an export is, and whether it is still wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class CancelledError(Exception):
    """The export was cancelled; nothing of it is to stay."""


class Progress:
    """Counts work in bytes or the like, tells ``report`` of it, and raises once cancelled.

    ``report`` is given the share done, 0 to 1, and the seconds left (``None`` while nothing can be
    said); it is called in the thread that works, not more often than every ``_PAUSE_S``.
    """

    _PAUSE_S = 0.1

    def __init__(self, report: Callable[[float, float | None], None]) -> None:
        self._report = report
        self._cancelled = threading.Event()
        self._start = time.monotonic()
        self._told = 0.0
        self._total = self._done = 0

    def expect(self, total: int) -> None:
        """Say how much work there is in all; the clock starts."""
        self._total, self._start = total, time.monotonic()

    def advance(self, amount: int) -> None:
        """Take note of work done. Raises ``CancelledError``."""
        self.check()
        self._done = min(self._done + amount, self._total)
        now = time.monotonic()
        if now - self._told < self._PAUSE_S and self._done < self._total:
            return
        self._told = now
        share = self._done / self._total if self._total else 0.0
        left = (now - self._start) * (1 - share) / share if share else None
        self._report(share, left)

    def cancel(self) -> None:
        """Have the work stop at its next step. Any thread."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the work is to stop."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise ``CancelledError`` if the work is to stop."""
        if self._cancelled.is_set():
            raise CancelledError
