"""Exports of a running server: one at a time, in a thread of its own, others in a bounded queue."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manylora_server.adapters.catalog import AdapterCatalog
from manylora_server.adapters.intake import Intake
from manylora_server.core.blocking import in_thread
from manylora_server.core.errors import (
    ExportNotFoundError,
    InvalidRequestError,
    ManyloraError,
    NotReadyError,
    OverloadedError,
    StorageError,
)
from manylora_server.core.store_errors import store_errors_translated
from manylora_server.export.job import ENDED, ExportDtype, ExportJob, ExportRequest, State
from manylora_server.export.output import check_goal, check_room, sweep
from manylora_server.export.progress import CancelledError, Progress
from manylora_store.export.methods import check_weight

if TYPE_CHECKING:
    from manylora_server.export.base import BaseCheckpoint
    from manylora_server.export.export import ServedBase

logger = logging.getLogger(__name__)

MAX_QUEUED = 8
_MAX_REMEMBERED = 100
_NICE = 10
_POLL_S = 0.02
_OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Bytes of one weight, 4-bit ones with their scales.
_WIDTHS = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "nf4": 0.52}


class ExportService:
    """Makes folders in ``exports`` of the base in ``base`` and of registered adapters.

    ``served`` gives the base in memory; it is called in the service's thread. Coroutines belong on
    an event loop and leave it free; the rest is thread-safe and quick. While an export lasts it
    holds leases on its adapters, so that they are neither removed nor changed under it.
    """

    def __init__(
        self,
        exports: Path,
        base: Path,
        model_name: str,
        catalog: AdapterCatalog,
        served: Callable[[], ServedBase],
    ) -> None:
        self._exports = exports
        self._base = base
        self._model_name = model_name
        self._catalog = catalog
        self._served = served
        self._changed = threading.Condition()
        self._jobs: OrderedDict[str, ExportJob] = OrderedDict()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._opened: BaseCheckpoint | None = None
        if exports.is_dir():
            left = sweep(exports)
            if left:
                logger.info("removed %d exports that were never finished", left)

    async def start(self, request: ExportRequest) -> dict[str, Any]:
        """Queue an export and return it.

        Raises ``InvalidRequestError`` for an output that is no name or exists, ``StorageError``
        where the disk has no room, ``OverloadedError`` where the queue is full.
        """
        goal = self._goal(request.output)
        if not request.adapters:
            raise InvalidRequestError(
                "adapters: none came; name one or more, such as {'support': 1.0}.",
                param="adapters",
            )
        choices = []
        for reference, weight in request.adapters.items():
            with store_errors_translated():
                check_weight(reference, weight)
            choices.append(await in_thread(self._catalog.resolve, reference))
        await in_thread(self._check_disk, request, goal)
        job = ExportJob(request, choices, goal)
        job.progress = Progress(lambda share, left: self._note(job, share, left))
        self._enqueue(job)
        return job.as_dict()

    def get(self, identity: str) -> dict[str, Any]:
        """Return an export. Raises ``ExportNotFoundError``."""
        with self._changed:
            return self._job(identity).as_dict()

    def list(self, *, limit: int, after: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return the first ``limit`` exports older than ``after``, newest first, and whether more
        follow."""
        with self._changed:
            jobs = list(reversed(self._jobs.values()))
            if after is not None:
                jobs = jobs[jobs.index(self._job(after)) + 1 :]
            return [job.as_dict() for job in jobs[:limit]], len(jobs) > limit

    async def cancel(self, identity: str) -> dict[str, Any]:
        """End an export that has not ended, and return it once nothing of it is left."""
        with self._changed:
            job = self._job(identity)
            job.progress.cancel()
            if job.state == "queued":
                self._end(job, "cancelled")
        while job.state not in ENDED:
            await asyncio.sleep(_POLL_S)
        return self.get(identity)

    def stop(self) -> None:
        """Cancel all exports and take no more."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.progress.cancel()
                if job.state == "queued":
                    self._end(job, "cancelled")
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended, after ``stop``."""
        if self._thread is not None:
            self._thread.join()

    def _goal(self, output: str) -> Path:
        if not _OUTPUT.fullmatch(output):
            raise InvalidRequestError(
                f"output: {output[:150]!r} is not a name for a folder in this server's exports; use"
                " 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit.",
                param="output",
            )
        return self._exports / output

    def _check_disk(self, request: ExportRequest, goal: Path) -> None:
        try:
            self._exports.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"output: {self._exports} cannot be made: {error.strerror}."
            ) from error
        check_goal(goal)
        if request.adapter_only:
            return
        if self._opened is None:
            from manylora_server.export.base import open_base

            self._opened = open_base(self._base)
        check_room(self._exports, _about(self._opened, request.dtype))

    def _enqueue(self, job: ExportJob) -> None:
        with self._changed:
            if self._closed:
                raise NotReadyError("the server is shutting down.")
            waiting = [other for other in self._jobs.values() if other.state == "queued"]
            if len(waiting) >= MAX_QUEUED:
                raise OverloadedError(
                    f"{len(waiting)} exports are waiting already; try again once one has ended."
                )
            for other in self._jobs.values():
                if other.goal == job.goal and other.state not in ENDED:
                    raise InvalidRequestError(
                        f"output: export {other.id} is about to write {job.request.output!r}; "
                        "choose another name.",
                        param="output",
                    )
            held = []
            try:
                for choice in job.choices:
                    self._catalog.lease(choice)
                    held.append(choice)
            except BaseException:
                for choice in held:
                    self._catalog.release(choice)
                raise
            self._jobs[job.id] = job
            self._forget_old()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="manylora-export", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _job(self, identity: str) -> ExportJob:
        job = self._jobs.get(identity)
        if job is None:
            raise ExportNotFoundError(
                f"id: no export {identity[:100]!r}; GET /admin/exports lists those since the "
                "server's start.",
                param="id",
            )
        return job

    def _forget_old(self) -> None:
        ended = [identity for identity, job in self._jobs.items() if job.state in ENDED]
        for identity in ended[: max(0, len(self._jobs) - _MAX_REMEMBERED)]:
            del self._jobs[identity]

    def _note(self, job: ExportJob, share: float, left: float | None) -> None:
        with self._changed:
            job.share, job.seconds_left = share, left

    def _end(
        self,
        job: ExportJob,
        state: State,
        *,
        report: Mapping[str, Any] | None = None,
        error: ManyloraError | None = None,
    ) -> None:
        """Take note of a job's end. With the lock held."""
        for choice in job.choices:
            self._catalog.release(choice)
        job.seconds_left = 0.0 if state == "done" else None
        job.share = 1.0 if state == "done" else job.share
        job.report = report
        if error is not None:
            job.error = {
                "message": error.message,
                "type": error.error_type,
                "param": error.param,
                "code": error.code,
            }
        job.state = state

    def _work(self) -> None:
        # As the loader of adapters: no second team of OpenMP workers, and after all others.
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                job = self._next()
                if job is None:
                    return
                job.state = "running"
            self._do(job)

    def _next(self) -> ExportJob | None:
        return next((job for job in self._jobs.values() if job.state == "queued"), None)

    def _do(self, job: ExportJob) -> None:
        logger.info("export %s to %s begins", job.id, job.goal)
        state: State = "done"
        report: Mapping[str, Any] | None = None
        failure: ManyloraError | None = None
        try:
            report = self._run(job)
        except CancelledError:
            state = "cancelled"
        except ManyloraError as error:
            # What stops the server also ends what it was waiting for.
            state = "cancelled" if job.progress.cancelled else "failed"
            failure = None if state == "cancelled" else error
        except Exception:
            logger.exception("export %s failed", job.id)
            state, failure = "failed", ManyloraError("the export failed; the log has the reason.")
        logger.info("export %s to %s: %s", job.id, job.goal, state)
        with self._changed:
            self._end(job, state, report=report, error=failure)

    def _run(self, job: ExportJob) -> Mapping[str, Any]:
        Intake.warm_up()
        from manylora_server.export.export import Export, WeightedFiles, run_export

        request = job.request
        with store_errors_translated(), ExitStack() as stack:
            adapters = [
                WeightedFiles(
                    choice.name,
                    weight,
                    stack.enter_context(self._catalog.store.files(choice.digest)),
                )
                for choice, weight in zip(job.choices, request.adapters.values(), strict=True)
            ]
            wanted = Export(
                model=self._model_name,
                base=self._base,
                adapters=adapters,
                goal=job.goal,
                recipe=request.recipe,
                dtype=request.dtype,
                adapter_only=request.adapter_only,
                polite=True,
            )
            return run_export(wanted, job.progress, self._served())


def _about(base: BaseCheckpoint, dtype: ExportDtype | None) -> int:
    """Return about how many bytes a checkpoint in ``dtype`` takes; the job knows it exactly."""
    total = 0.0
    for source in base.sources.values():
        count = source.form.bytes // source.form.dtype.itemsize
        width = source.form.dtype.itemsize if dtype is None else _WIDTHS[dtype]
        total += count * width
    return int(total)
