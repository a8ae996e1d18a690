"""What the GPU benchmarks measure with: graph replays between events, and the card's own rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

ROTATED_BYTES = 256 * 1024**2


def graph_of(calls: list[Callable[[], object]]) -> Any:
    """Return a CUDA graph of ``calls`` one after the other, all of them warmed up."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def seconds(calls: list[Callable[[], object]], rounds: int = 20) -> tuple[float, float]:
    """Return the median and the best time of one call: replays of all in turn, launch gaps gone."""
    graph = graph_of(calls)
    repeats = max(1, 64 // len(calls))
    times = []
    for _ in range(3):
        graph.replay()
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats / len(calls))
    return statistics.median(times), min(times)


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(1024**3, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)])[0]


def copies(size: int) -> int:
    """Return how many copies of ``size`` bytes no cache holds."""
    return max(2, min(64, -(-ROTATED_BYTES // max(1, size))))
