"""Runs the engine's requests of one call side by side and merges what they yield."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from manylora_server.core.errors import (
    EngineFailureError,
    ManyloraError,
    NotReadyError,
    RequestTimeoutError,
)
from manylora_server.core.types import FinishReason, Request, RequestOutput

if TYPE_CHECKING:
    from manylora_server.engine.async_engine import AsyncEngine

ResultT = TypeVar("ResultT")


class Generation:
    """The requests of one call, running. ``close`` aborts those that have not finished.

    Iterating yields ``(index, output)`` as outputs come and ends after every request's last.
    A request that cannot be accepted, or that ends without a result, raises its
    ``ManyloraError``; requests that are refused at once raise before any output comes.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        for request in requests:
            engine.validate(request)
        self._events: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()
        self._running = len(requests)
        self._tasks = [
            asyncio.create_task(self._pump(index, engine.generate(request)))
            for index, request in enumerate(requests)
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if self._running == 0:
            raise StopAsyncIteration
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if event.finish_reason is not None:
            self._running -= 1
            failure = _failure(event)
            if failure is not None:
                raise failure
        return index, event

    async def close(self) -> None:
        """Abort what still runs. Cancelling a task closes the engine's iterator within it."""
        await cancel(*self._tasks)

    async def _pump(self, index: int, outputs: AsyncIterator[RequestOutput]) -> None:
        try:
            async for output in outputs:
                self._events.put_nowait((index, output))
        except Exception as error:  # noqa: BLE001 - the iterating side raises it
            self._events.put_nowait((index, error))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Return the result of ``work``; cancel it and raise ``ClientDisconnect`` if the client goes.

    The request's body must have been read.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await cancel(working, leaving)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel ``tasks`` and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _failure(output: RequestOutput) -> ManyloraError | None:
    match output.finish_reason:
        case FinishReason.TIMEOUT:
            return RequestTimeoutError(
                f"timeout_s: it passed after {output.completion_tokens} tokens; allow more time "
                "or ask for fewer tokens.",
                param="timeout_s",
            )
        case FinishReason.ERROR:
            return EngineFailureError(output.error or "the engine failed on this request.")
        case FinishReason.ABORT:
            return NotReadyError("the server is shutting down and ended this request.")
        case _:
            return None
