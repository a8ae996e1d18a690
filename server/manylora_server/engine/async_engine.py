"""The engine behind an event loop: one thread steps, each request has its own stream."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.adapters.intake import Intake
from manylora_server.adapters.service import AdapterService
from manylora_server.core.errors import NotReadyError
from manylora_server.core.types import AdapterChoice, FinishReason, Request, RequestOutput
from manylora_server.engine.engine import Engine
from manylora_server.engine.limits import EngineLimits
from manylora_server.engine.thread import EngineThread
from manylora_server.export.jobs import ExportService
from manylora_server.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

# A step with nothing to compute is tried again after this; what it waits for wakes it earlier.
_STALLED_S = 0.02


@dataclass(frozen=True, slots=True)
class _Stream:
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput]
    leased: tuple[AdapterChoice, ...]


class AsyncEngine:
    """Accepts requests from event loops and runs ``Engine`` in ``thread``.

    The thread alone touches the engine; additions and aborts reach it through a queue and take
    effect before its next step.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterCatalog,
        intake: Intake,
        tokenizer: Tokenizer,
        model_name: str,
        limits: EngineLimits,
        thread: EngineThread | None = None,
        prepare: Callable[[], None] | None = None,
        exports: Callable[[AsyncEngine], ExportService] | None = None,
    ) -> None:
        self.adapters = adapters
        self._prepare = prepare or _nothing
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.created = int(time.time())
        self.limits = limits
        self._engine = engine
        self._inbox: queue.SimpleQueue[Request | str | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()
        self._accepting = False
        self._stopped = False
        self._started = False
        self._thread = thread or EngineThread()
        residency = engine.residency
        residency.host.on_loaded = self.wake
        self.adapter_service = AdapterService(
            adapters,
            intake,
            residency,
            residency.host,
            engine.twins,
            self,
            lambda: engine.state,
            engine.observer,
        )
        self._export_service = None if exports is None else exports(self)

    @property
    def export_service(self) -> ExportService:
        """Exports of the base with its adapters."""
        if self._export_service is None:
            raise NotReadyError("this engine makes no exports.")
        return self._export_service

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows."""
        return self.limits.vocab_size

    @property
    def ready(self) -> bool:
        """Whether requests are accepted now."""
        return self._accepting and not self.dead

    @property
    def dead(self) -> bool:
        """Whether the engine's thread has ended; only a restart helps then."""
        return self._started and not self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """How many accepted requests have not ended."""
        with self._lock:
            return len(self._streams)

    def start(self) -> None:
        """Start stepping and accepting requests."""
        self._thread.finish_with(self._run)
        self._started = self._accepting = True

    def validate(self, request: Request) -> None:
        """Raise the ``ManyloraError`` for which ``request`` could not be accepted now, if any."""
        if not self.ready:
            raise NotReadyError("the server is starting or shutting down; try again later.")
        self.limits.check(request, self.unfinished, self._engine.residency.pinned)

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run ``request`` and yield its outputs as they come; the last has a finish reason.

        Raises what ``validate`` raises, before the first output. Closing the iterator early
        aborts the request.
        """
        self.validate(request)
        leased = () if request.adapter is None else request.adapter.choices
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue(), leased)
        request_id = request.request_id
        with self._lock:
            # Under the lock, so that the thread's last look at its inbox sees every request.
            if self._stopped:
                raise NotReadyError("the server is shutting down.")
            assert request_id not in self._streams, "request ids must be unique"
            self.adapters.lease(*leased)
            self._streams[request_id] = stream
            self._inbox.put(request)
        finished = False
        try:
            while not finished:
                output = await stream.outputs.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                self._inbox.put(request_id)

    def run(self, task: Callable[[], ResultT]) -> Future[ResultT]:
        """Run ``task`` in the engine's thread, before its next step; return its result to come.

        Once the thread has ended, the result is a ``NotReadyError``.
        """
        future: Future[ResultT] = Future()

        def work() -> None:
            if self._stopped:
                future.set_exception(NotReadyError("the server is shutting down."))
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                    future.set_exception(error)

        with self._lock:
            if not self._stopped:
                self._inbox.put(work)
                return future
        work()
        return future

    def warm_up(self) -> None:
        """Get ready, in the background: ``prepare``, then for the first adapter if there are any.

        Once requests can be answered, since it competes with whatever is to be done before.
        """

        def work() -> None:
            self.prepare()
            if self.adapters.served():
                self._engine.residency.host.start()

        self._inbox.put(work)

    def prepare(self) -> None:
        """Do, once, what makes steps faster but is not needed for them. In the thread of steps."""
        prepare, self._prepare = self._prepare, _nothing
        try:
            prepare()
        except Exception:
            logger.exception("steps could not be made faster")

    def wake(self) -> None:
        """Let the thread look again at what it waits for."""
        self._inbox.put(_nothing)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the accepted ones finish for ``timeout_s``, abort the rest."""
        self._accepting = False
        deadline = time.monotonic() + timeout_s
        while self.unfinished and not self.dead and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        with self._lock:
            rest = list(self._streams)
        if rest:
            logger.warning("%d requests did not finish in time and are aborted", len(rest))
        for request_id in rest:
            self._inbox.put(request_id)
        while self.unfinished and not self.dead:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Stop the thread after its current step. Unfinished requests end with an error."""
        self._accepting = False
        if self._export_service is not None:
            self._export_service.stop()
        if not self._started:
            self._thread.finish_with(lambda: None)
        self._inbox.put(None)
        self._thread.join()
        if self._export_service is not None:
            self._export_service.join()
        self._engine.residency.host.close()
        self.adapter_service.close()
        self.adapters.store.close()

    def _run(self) -> None:
        outputs: list[RequestOutput] = []
        try:
            while self._receive():
                try:
                    outputs = self._engine.step()
                except Exception:
                    logger.exception("the engine failed between steps")
                    outputs = self._engine.fail_all("the engine failed")
                    self._engine.report_state()
                self._deliver(outputs)
        except Exception:
            logger.exception("the engine's thread ends; only a restart helps")
        finally:
            self._accepting = False
            with self._lock:
                self._stopped = True
            self._end_streams("the server is shutting down")

    def _end_streams(self, message: str) -> None:
        """End every request with an error, in whatever state the engine is."""
        try:
            while not self._inbox.empty():
                sent = self._inbox.get()
                if isinstance(sent, Request):
                    self._add(sent)
                elif callable(sent):
                    sent()
            self._deliver(self._engine.fail_all(message))
            self._engine.residency.refuse_asked(NotReadyError(f"{message}."))
            self._engine.twins.refuse_all(NotReadyError(f"{message}."))
            self._engine.report_state()
        except Exception:
            logger.exception("the engine could not end its requests")
        with self._lock:
            rest = list(self._streams)
        self._deliver([_failure(request_id, message) for request_id in rest])

    def _receive(self) -> bool:
        """Take in what was sent, waiting for it where there is no work; false to stop.

        Of the tasks to run in between, one at most comes before a step that has work to do.
        """
        patience = self._patience()
        while True:
            try:
                message = self._inbox.get(timeout=patience)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, Request):
                self._add(message)
            elif isinstance(message, str):
                output = self._engine.abort(message)
                if output is not None:
                    self._deliver([output])
                self._engine.report_state()
            else:
                message()
                if self._engine.has_work:
                    return True
            patience = 0.0 if self._engine.has_work else None

    def _patience(self) -> float | None:
        """Return how long a step may wait for a message: for ever if there is nothing to do."""
        if not self._engine.has_work:
            return None
        return _STALLED_S if self._engine.stalled else 0.0

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception:
            logger.exception("request %s could not be added", request.request_id)
            self._deliver([_failure(request.request_id, "the request could not be added")])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Send each output to its stream, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput]]] = {}
        ended: list[tuple[AdapterChoice, ...]] = []
        with self._lock:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                    ended.append(stream.leased)
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for leased in ended:
            self.adapters.release(*leased)
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:
                # A loop that has been closed takes no calls, and nobody waits in it any more.
                if not loop.is_closed():
                    raise


def _failure(request_id: str, message: str) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        text="",
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=message,
    )


def _nothing() -> None:
    """Ask for nothing: the message itself wakes the thread."""


def _put_all(items: list[tuple[_Stream, RequestOutput]]) -> None:
    for stream, output in items:
        stream.outputs.put_nowait(output)
