"""Prometheus metrics: names, labels, and a bounded number of them."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from manylora_server.api.metrics import MAX_ADAPTER_LABELS, PrometheusMetrics
from manylora_server.core.observer import EngineObserver, EngineState, FinishedRequest, StepStats
from manylora_server.core.types import FinishReason

STEP = StepStats(seconds=0.02, batch_tokens=37, distinct_adapters=3, preemptions=1)
STATE = EngineState(
    running_sequences=5,
    queue_depth=2,
    kv_blocks_used=7,
    kv_blocks_cached=4,
    kv_blocks_free=9,
    adapters_on_device=3,
    adapters_on_host=8,
)


def finished(adapter: str | None) -> FinishedRequest:
    return FinishedRequest(adapter, FinishReason.STOP, 1.5, 10, 4, 20)


def value(metrics: PrometheusMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"manylora_{name}", labels)


def test_it_is_an_observer():
    observer: EngineObserver = PrometheusMetrics()
    observer.on_step(STEP)
    observer.on_state(STATE)


def test_all_names_of_the_contract_are_served(api):
    metrics = api.app.state.services.metrics
    metrics.on_finish(finished("alpha"))
    metrics.on_adapter_load(0.1, tier="device", succeeded=True)
    response = api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    names = {
        sample.name
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    counters = {"requests", "tokens", "adapter_loads", "adapter_evictions", "merged_steps"}
    histograms = {
        "time_to_first_token_seconds",
        "inter_token_seconds",
        "request_seconds",
        "batch_tokens",
        "batch_distinct_adapters",
        "adapter_load_seconds",
        "engine_step_seconds",
    }
    expected = {f"manylora_{name}_total" for name in counters}
    expected |= {f"manylora_{name}_bucket" for name in histograms}
    expected |= {"manylora_queue_depth", "manylora_running_sequences", "manylora_build_info"}
    assert expected <= names


def test_steps():
    metrics = PrometheusMetrics()
    metrics.on_step(STEP)
    metrics.on_state(STATE)
    metrics.on_step(STEP)
    metrics.on_state(STATE)
    assert value(metrics, "queue_depth") == 2
    assert value(metrics, "running_sequences") == 5
    assert value(metrics, "batch_tokens_sum") == 74
    assert value(metrics, "batch_distinct_adapters_sum") == 6
    assert value(metrics, "engine_step_seconds_count") == 2
    assert value(metrics, "kv_blocks", state="used") == 7
    assert value(metrics, "kv_blocks", state="cached") == 4
    assert value(metrics, "kv_blocks", state="free") == 9
    assert value(metrics, "adapter_residency", tier="device") == 3
    assert value(metrics, "adapter_residency", tier="host") == 8
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "merged_steps_total") == 0


def test_merges():
    metrics = PrometheusMetrics()
    metrics.on_step(replace(STEP, merged=True))
    metrics.on_twins(2, 4096)
    metrics.on_auto_merge("promote")
    assert value(metrics, "merged_steps_total") == 1
    assert value(metrics, "twins") == 2
    assert value(metrics, "twin_bytes") == 4096
    assert value(metrics, "auto_merge_decisions_total", decision="promote") == 1


def test_requests_and_tokens():
    metrics = PrometheusMetrics()
    metrics.on_first_token("alpha", 0.3)
    metrics.on_inter_token("alpha", 0.02)
    metrics.on_finish(finished("alpha"))
    metrics.on_finish(finished(None))
    for label in ("alpha", "_base"):
        assert value(metrics, "requests_total", adapter=label, finish_reason="stop") == 1
        assert value(metrics, "tokens_total", adapter=label, kind="prompt") == 10
        assert value(metrics, "tokens_total", adapter=label, kind="cached") == 4
        assert value(metrics, "tokens_total", adapter=label, kind="generated") == 20
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.3
    assert value(metrics, "inter_token_seconds_count") == 1
    assert value(metrics, "request_seconds_sum") == 3.0


def test_adapters_coming_and_going():
    metrics = PrometheusMetrics()
    metrics.on_adapter_load(0.2, tier="device", succeeded=True)
    metrics.on_adapter_load(0.1, tier="host", succeeded=False)
    metrics.on_adapter_eviction()
    assert value(metrics, "adapter_loads_total", tier="device", outcome="loaded") == 1
    assert value(metrics, "adapter_loads_total", tier="host", outcome="failed") == 1
    assert value(metrics, "adapter_load_seconds_count") == 2
    assert value(metrics, "adapter_evictions_total") == 1


def test_thousands_of_adapters_share_a_label():
    metrics = PrometheusMetrics()
    for number in range(3000):
        metrics.on_finish(finished(f"a{number}"))
    metrics.on_finish(finished("a0"))
    metrics.on_finish(finished(None))
    [family] = [item for item in metrics.registry.collect() if item.name == "manylora_requests"]
    labels = {sample.labels["adapter"] for sample in family.samples}
    assert len(labels) == MAX_ADAPTER_LABELS + 2
    assert value(metrics, "requests_total", adapter="a0", finish_reason="stop") == 2
    assert value(metrics, "requests_total", adapter="_other", finish_reason="stop") == 2900


def test_servers_do_not_share_a_registry():
    first, second = PrometheusMetrics(), PrometheusMetrics()
    first.on_adapter_eviction()
    assert value(second, "adapter_evictions_total") == 0
