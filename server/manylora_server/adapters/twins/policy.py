"""Which adapters to merge without being asked, and which of those to let go. Knows no tensors.

Every few seconds it reckons, for each adapter, the seconds a minute that a twin saves (or would
save) in steps that are its alone: by the measured times of both paths where it has, or once had, a
twin; else by the share of a step that twins saved so far. An adapter is promoted when that stays
above one mark, and demoted when it stays below a lower one.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manylora_server.adapters.twins.record import TwinRecord
from manylora_server.adapters.twins.step_times import PathChoice

# Measured choices of adapters that have no twin any more.
_REMEMBERED = 256
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """``promote_s`` and ``demote_s``: seconds saved a minute. ``patience``: evaluations in a row.

    ``residence_s``: how long a twin stays at least; ``retry_s``: how long an adapter that could not
    be merged is left alone. One twin displaces another if it saves ``advantage`` times as much.
    ``first_gain``: the share of a step that a twin is taken to save before any was measured.
    """

    every_s: float = 5.0
    window_s: float = 60.0
    promote_s: float = 1.0
    demote_s: float = 0.3
    patience: int = 3
    residence_s: float = 60.0
    retry_s: float = 600.0
    advantage: float = 1.5
    first_gain: float = 0.1


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the adapter ``digest``, and why."""

    action: Literal["promote", "demote"]
    digest: str
    reason: str
    at: float

    def as_dict(self, now: float) -> dict[str, Any]:
        """Return it JSON-ready, with its age."""
        return {
            "action": self.action,
            "digest": self.digest,
            "reason": self.reason,
            "seconds_ago": round(now - self.at, 1),
        }


# Steps and their seconds by number of tokens.
_Steps = dict[int, tuple[int, float]]


class AutoMerge:
    """See the module docstring. Deterministic: all it knows of time is ``clock``."""

    def __init__(
        self,
        settings: PolicySettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or PolicySettings()
        self._clock = clock
        self._began = self._evaluated = clock()
        self._period: dict[str, _Steps] = {}
        count = max(1, round(self.settings.window_s / self.settings.every_s))
        self._window: deque[dict[str, _Steps]] = deque(maxlen=count)
        self._choices: OrderedDict[str, PathChoice] = OrderedDict()
        self._gains: list[float] = []
        self._above: Counter[str] = Counter()
        self._below: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._barred: dict[str, tuple[float, str]] = {}
        self._sizes: dict[str, int] = {}
        self._saved: dict[str, float] = {}
        self.last: Decision | None = None

    def note_step(self, digest: str | None, tokens: int, seconds: float) -> None:
        """Take note of a step; ``digest`` is the adapter that all of its rows are of, if any."""
        if digest is not None:
            steps = self._period.setdefault(digest, {})
            count, total = steps.get(tokens, (0, 0.0))
            steps[tokens] = (count + 1, total + seconds)

    def merged(self, digest: str, record: TwinRecord) -> None:
        """Take note of a twin that may be used from now on, whoever asked for it."""
        self._since[digest] = self._clock()
        self._sizes[digest] = record.bytes
        self._choices[digest] = record.choice
        self._choices.move_to_end(digest)
        while len(self._choices) > _REMEMBERED:
            self._choices.popitem(last=False)
        steps = self._steps().get(digest)
        if steps:
            fused = sum(n * record.choice.fused.at(t) for t, (n, _) in steps.items())
            saved = sum(n * max(0.0, record.choice.saved(t)) for t, (n, _) in steps.items())
            self._gains.append(saved / fused)
            del self._gains[:-_SHOWN]

    def failed(self, digest: str, reason: str) -> None:
        """Take note that the adapter could not be merged."""
        self._barred[digest] = (self._clock() + self.settings.retry_s, reason)

    def no_room(self, digest: str, size: int) -> None:
        """Take note that the adapter's twin takes ``size`` bytes, more than are free."""
        self._sizes[digest] = size

    def decide(self, twins: Mapping[str, TwinRecord], free: int, *, busy: bool) -> Decision | None:
        """Return what to do now, ``None`` for nothing.

        ``free``: bytes for further twins; ``busy``: a merge is under way, so none is begun.
        """
        now = self._clock()
        if now - self._evaluated < self.settings.every_s:
            return None
        self._evaluated = now
        self._window.append(self._period)
        self._period = {}
        self._barred = {d: bar for d, bar in self._barred.items() if bar[0] > now}
        self._reckon(now, twins)
        decision = self._demotion(now, twins) or self._promotion(now, twins, free, busy=busy)
        if decision is not None:
            self.last = decision
            self._above.pop(decision.digest, None)
            self._below.pop(decision.digest, None)
        return decision

    def stats(self) -> dict[str, Any]:
        """Return what was decided last, and what speaks for whom."""
        now = self._clock()
        best = sorted(self._saved.items(), key=lambda item: -item[1])[:_SHOWN]
        last = self.last
        return {
            "enabled": True,
            "last_decision": None if last is None else last.as_dict(now),
            "expected_gain": round(self._gain(), 4),
            "candidates": [
                {
                    "digest": digest,
                    "saved_s_per_minute": round(saved, 4),
                    "measured": digest in self._choices,
                    "evaluations_above": self._above[digest],
                    "evaluations_below": self._below[digest],
                    "left_alone": self._barred.get(digest, (0.0, None))[1],
                }
                for digest, saved in best
            ],
        }

    def _steps(self) -> dict[str, _Steps]:
        """Return all steps of the window, by adapter."""
        total: dict[str, _Steps] = {}
        for period in [*self._window, self._period]:
            for digest, steps in period.items():
                into = total.setdefault(digest, {})
                for tokens, (count, seconds) in steps.items():
                    before = into.get(tokens, (0, 0.0))
                    into[tokens] = (before[0] + count, before[1] + seconds)
        return total

    def _gain(self) -> float:
        return sum(self._gains) / len(self._gains) if self._gains else self.settings.first_gain

    def _reckon(self, now: float, twins: Mapping[str, TwinRecord]) -> None:
        settings = self.settings
        minutes = max(settings.every_s, min(settings.window_s, now - self._began)) / 60
        saved: dict[str, float] = dict.fromkeys(twins, 0.0)
        for digest, steps in self._steps().items():
            choice = self._choices.get(digest)
            if choice is None:
                seconds = self._gain() * sum(total for _, total in steps.values())
            else:
                seconds = sum(n * max(0.0, choice.saved(t)) for t, (n, _) in steps.items())
            saved[digest] = seconds / minutes
        self._saved = saved
        above = {d for d, s in saved.items() if s >= settings.promote_s}
        below = {d for d, s in saved.items() if s < settings.demote_s}
        self._above = Counter({digest: self._above[digest] + 1 for digest in above})
        self._below = Counter({digest: self._below[digest] + 1 for digest in below})

    def _settled(self, now: float, twins: Mapping[str, TwinRecord]) -> list[str]:
        """Return the adapters that were promoted, and long enough ago to be let go."""
        residence = self.settings.residence_s
        return [
            digest
            for digest, record in twins.items()
            if record.automatic and now - self._since.get(digest, 0.0) >= residence
        ]

    def _demotion(self, now: float, twins: Mapping[str, TwinRecord]) -> Decision | None:
        settings = self.settings
        for digest in self._settled(now, twins):
            if self._below[digest] >= settings.patience:
                reason = (
                    f"saves {self._saved[digest]:.2f} s a minute, and has for "
                    f"{self._below[digest]} evaluations saved less than {settings.demote_s:.2f}"
                )
                return Decision("demote", digest, reason, now)
        return None

    def _promotion(
        self, now: float, twins: Mapping[str, TwinRecord], free: int, *, busy: bool
    ) -> Decision | None:
        settings = self.settings
        if busy:
            return None
        ready = [
            digest
            for digest, count in self._above.items()
            if count >= settings.patience and digest not in twins and digest not in self._barred
        ]
        for digest in sorted(ready, key=lambda d: (-self._saved[d], d)):
            if self._sizes.get(digest, 0) <= free:
                known = "measured" if digest in self._choices else "expected"
                reason = f"{known} to save {self._saved[digest]:.2f} s a minute"
                return Decision("promote", digest, reason, now)
            settled = self._settled(now, twins)
            weakest = min(settled, key=lambda d: self._saved[d], default=None)
            if weakest is None:
                continue
            if settings.advantage * self._saved[weakest] < self._saved[digest]:
                reason = (
                    f"saves {self._saved[weakest]:.2f} s a minute, and makes room for "
                    f"{digest[:12]}, which would save {self._saved[digest]:.2f}"
                )
                return Decision("demote", weakest, reason, now)
        return None
