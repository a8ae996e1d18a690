"""What the benchmarks of this folder measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

READ_FLOATS = 64 * 1024**2


def seconds(call: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Return the median and the best time of ``call(i)``, ``i`` counting up.

    Over at least ``rounds`` calls and 0.2 s.
    """
    for index in range(2):
        call(index)
    times: list[float] = []
    while len(times) < rounds or sum(times) < 0.2:
        begin = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - begin)
    return statistics.median(times), min(times)


def read_bandwidth() -> float:
    """Return bytes a second of summing an array far larger than any cache, with torch's threads."""
    array = torch.ones(READ_FLOATS)
    return array.numel() * 4 / seconds(lambda _: array.sum(), 9)[0]
