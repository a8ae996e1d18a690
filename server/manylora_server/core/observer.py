"""What the engine tells whoever watches it (metrics), without knowing who that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from manylora_server.core.types import FinishReason


@dataclass(frozen=True, slots=True)
class StepStats:
    """One engine step. Tokens are rows of the flattened batch; the base is no adapter.

    ``merged``: it used a twin.
    """

    seconds: float
    batch_tokens: int
    distinct_adapters: int
    preemptions: int
    merged: bool = False


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine holds now: sequences, requests that wait, KV blocks, adapters."""

    running_sequences: int
    queue_depth: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_free: int
    adapters_on_device: int
    adapters_on_host: int


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One request at its end; times in seconds.

    ``adapter`` is its name, ``AdapterMix.label`` for a mix, ``None`` for the base.
    """

    adapter: str | None
    finish_reason: FinishReason
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class EngineObserver(Protocol):
    """Called on the engine's thread; must be quick, thread-safe and must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """Take note of a finished step."""

    def on_state(self, state: EngineState) -> None:
        """Take note of what the engine holds: after each step, and when it becomes idle."""

    def on_first_token(self, adapter: str | None, seconds: float) -> None:
        """Take note of the time from a request's arrival to its first token."""

    def on_inter_token(self, adapter: str | None, seconds: float) -> None:
        """Take note of the time between two tokens of one request."""

    def on_finish(self, request: FinishedRequest) -> None:
        """Take note of a request's end, whatever its reason."""

    def on_adapter_load(self, seconds: float, *, tier: str, succeeded: bool) -> None:
        """Take note of an adapter brought to ``tier`` (``host`` or ``device``)."""

    def on_adapter_eviction(self) -> None:
        """Take note of an adapter that lost its device slot to another."""

    def on_registered(self, count: int) -> None:
        """Take note of how many names are registered now, wherever their adapters are."""

    def on_twins(self, count: int, size: int) -> None:
        """Take note of how many merged twins there are now, and of their bytes."""

    def on_auto_merge(self, decision: str) -> None:
        """Take note of what the automatic policy decided (``promote``, ``demote``)."""


class NullObserver:
    """Watches nothing; for engines without metrics."""

    def on_step(self, stats: StepStats) -> None:
        """Ignore."""

    def on_state(self, state: EngineState) -> None:
        """Ignore."""

    def on_first_token(self, adapter: str | None, seconds: float) -> None:
        """Ignore."""

    def on_inter_token(self, adapter: str | None, seconds: float) -> None:
        """Ignore."""

    def on_finish(self, request: FinishedRequest) -> None:
        """Ignore."""

    def on_adapter_load(self, seconds: float, *, tier: str, succeeded: bool) -> None:
        """Ignore."""

    def on_adapter_eviction(self) -> None:
        """Ignore."""

    def on_registered(self, count: int) -> None:
        """Ignore."""

    def on_twins(self, count: int, size: int) -> None:
        """Ignore."""

    def on_auto_merge(self, decision: str) -> None:
        """Ignore."""
