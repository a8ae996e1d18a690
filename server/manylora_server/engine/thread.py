"""The one thread in which all tensor work of a server is done, from loading to the last step.

OpenMP keeps a team of workers for every thread that ever ran a parallel region. With a second team
there are more workers than cores, and GNU's runtime then lets idle ones sleep at once and not spin:
the base loaded in the main thread and stepped in another cost a quarter of the throughput, and
half of it with adapters (docs/performance.md).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

ResultT = TypeVar("ResultT")


class EngineThread(threading.Thread):
    """Runs what it is given, in order, until ``finish_with``. A daemon: it holds up no exit."""

    def __init__(self) -> None:
        super().__init__(name="manylora-engine", daemon=True)
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.start()

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Run ``function`` in the thread; return its result or raise what it raised."""
        future: Future[ResultT] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                future.set_exception(error)

        self._tasks.put(task)
        return future.result()

    def finish_with(self, function: Callable[[], None]) -> None:
        """Run ``function`` as the last; the thread ends with it. Returns at once."""
        self._tasks.put(function)
        self._tasks.put(None)

    def run(self) -> None:
        """Work until told to finish."""
        while (task := self._tasks.get()) is not None:
            task()
