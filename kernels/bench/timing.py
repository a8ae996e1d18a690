"""What benchmarks of kernels share: how to time a call, and what the machine can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Copies of what a call reads are rotated through until they hold this much, as a model's layers.
ROTATED_BYTES = 160 * 1024**2
_READ_FLOATS = 64 * 1024**2
_PRODUCT = 1536


def seconds(call: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Return the median and the best time of ``call(i)``, ``i`` counting up.

    Over at least ``rounds`` calls and 0.15 s.
    """
    for index in range(2):
        call(index)
    times: list[float] = []
    while len(times) < rounds or sum(times) < 0.15:
        begin = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - begin)
    return statistics.median(times), min(times)


def read_bandwidth() -> float:
    """Return bytes a second of summing an array far larger than any cache, with torch's threads."""
    array = torch.ones(_READ_FLOATS)
    return array.numel() * 4 / seconds(lambda _: array.sum(), 9)[0]


def product_rate() -> float:
    """Return floating-point operations a second of torch's own float32 matrix product."""
    a, b = torch.randn(_PRODUCT, _PRODUCT), torch.randn(_PRODUCT, _PRODUCT)
    return 2 * _PRODUCT**3 / seconds(lambda _: a @ b, 5)[0]
