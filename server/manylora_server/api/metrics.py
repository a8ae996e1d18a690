"""The server's Prometheus metrics (DESIGN section 8), fed by the engine as its observer."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from manylora_server.core.observer import EngineState, FinishedRequest, StepStats
from manylora_server.version import __version__

BASE_LABEL = "_base"
OTHER_LABEL = "_other"
MAX_ADAPTER_LABELS = 100

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class AdapterLabels:
    """Names for the ``adapter`` label: the first hundred keep theirs, later ones share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()

    def label(self, adapter: str | None) -> str:
        """Return the label for an adapter's name; ``None`` is the base."""
        if adapter is None:
            return BASE_LABEL
        with self._lock:
            if adapter not in self._known:
                if len(self._known) >= MAX_ADAPTER_LABELS:
                    return OTHER_LABEL
                self._known.add(adapter)
            return adapter


class PrometheusMetrics:
    """An ``EngineObserver`` that keeps its numbers in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._labels = AdapterLabels()
        self._requests = Counter(
            "manylora_requests",
            "Requests ended.",
            ("adapter", "finish_reason"),
            registry=registry,
        )
        self._tokens = Counter(
            "manylora_tokens",
            "Tokens: of prompts, of prompts from the prefix cache, and generated.",
            ("adapter", "kind"),
            registry=registry,
        )
        self._first_token = _histogram(
            registry, "time_to_first_token_seconds", "From arrival to the first token.", _LATENCY
        )
        self._inter_token = _histogram(
            registry, "inter_token_seconds", "Between two tokens of a request.", _LATENCY
        )
        self._request_seconds = _histogram(
            registry, "request_seconds", "From a request's arrival to its end.", _REQUEST
        )
        self._step_seconds = _histogram(
            registry, "engine_step_seconds", "Time of an engine step.", _STEP
        )
        self._batch_tokens = _histogram(
            registry, "batch_tokens", "Tokens in an engine step.", _TOKENS
        )
        self._distinct_adapters = _histogram(
            registry, "batch_distinct_adapters", "Distinct adapters in an engine step.", _ADAPTERS
        )
        self._queue_depth = _gauge(registry, "queue_depth", "Requests that wait.")
        self._running = _gauge(registry, "running_sequences", "Sequences that run.")
        self._kv_blocks = _gauge(registry, "kv_blocks", "Blocks of the KV cache.", "state")
        self._residency = _gauge(registry, "adapter_residency", "Adapters held.", "tier")
        self._loads = Counter(
            "manylora_adapter_loads",
            "Adapters brought to a tier.",
            ("tier", "outcome"),
            registry=registry,
        )
        self._load_seconds = _histogram(
            registry, "adapter_load_seconds", "Time to bring an adapter to a tier.", _LATENCY
        )
        self._evictions = Counter(
            "manylora_adapter_evictions", "Adapters that lost their slot.", registry=registry
        )
        self._preemptions = Counter(
            "manylora_preemptions", "Sequences put back to the queue.", registry=registry
        )
        self._merged_steps = Counter(
            "manylora_merged_steps", "Steps that used a merged twin.", registry=registry
        )
        self._twins = _gauge(registry, "twins", "Merged twins held.")
        self._twin_bytes = _gauge(registry, "twin_bytes", "Memory of all merged twins.")
        self._auto_merges = Counter(
            "manylora_auto_merge_decisions",
            "What the automatic policy did.",
            ("decision",),
            registry=registry,
        )
        Info("manylora_build", "What runs here.", registry=registry).info({"version": __version__})

    def on_step(self, stats: StepStats) -> None:
        """Take note of a finished step."""
        self._step_seconds.observe(stats.seconds)
        self._batch_tokens.observe(stats.batch_tokens)
        self._distinct_adapters.observe(stats.distinct_adapters)
        self._preemptions.inc(stats.preemptions)
        self._merged_steps.inc(int(stats.merged))

    def on_state(self, state: EngineState) -> None:
        """Take note of what the engine holds."""
        self._queue_depth.set(state.queue_depth)
        self._running.set(state.running_sequences)
        self._kv_blocks.labels("used").set(state.kv_blocks_used)
        self._kv_blocks.labels("cached").set(state.kv_blocks_cached)
        self._kv_blocks.labels("free").set(state.kv_blocks_free)
        self._residency.labels("device").set(state.adapters_on_device)
        self._residency.labels("host").set(state.adapters_on_host)

    def on_first_token(self, adapter: str | None, seconds: float) -> None:
        """Take note of the time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def on_inter_token(self, adapter: str | None, seconds: float) -> None:
        """Take note of the time between two tokens of one request."""
        self._inter_token.observe(seconds)

    def on_finish(self, request: FinishedRequest) -> None:
        """Take note of a request's end, whatever its reason."""
        label = self._labels.label(request.adapter)
        self._requests.labels(label, request.finish_reason).inc()
        self._request_seconds.observe(request.seconds)
        self._tokens.labels(label, "prompt").inc(request.prompt_tokens)
        self._tokens.labels(label, "cached").inc(request.cached_tokens)
        self._tokens.labels(label, "generated").inc(request.generated_tokens)

    def on_adapter_load(self, seconds: float, *, tier: str, succeeded: bool) -> None:
        """Take note of an adapter brought to ``tier`` (``host`` or ``device``)."""
        self._loads.labels(tier, "loaded" if succeeded else "failed").inc()
        self._load_seconds.observe(seconds)

    def on_adapter_eviction(self) -> None:
        """Take note of an adapter that lost its device slot to another."""
        self._evictions.inc()

    def on_registered(self, count: int) -> None:
        """Take note of how many names are registered now; all of them are on disk."""
        self._residency.labels("disk").set(count)

    def on_twins(self, count: int, size: int) -> None:
        """Take note of how many merged twins there are, and of their bytes."""
        self._twins.set(count)
        self._twin_bytes.set(size)

    def on_auto_merge(self, decision: str) -> None:
        """Take note of what the automatic policy decided."""
        self._auto_merges.labels(decision).inc()


def _histogram(
    registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]
) -> Histogram:
    return Histogram(f"manylora_{name}", text, registry=registry, buckets=buckets)


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"manylora_{name}", text, labels, registry=registry)
