"""The merged twins of a server: which there are, which is being made, and which a step may use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from manylora_server.adapters.memory import give_memory_back
from manylora_server.adapters.residency import Residency
from manylora_server.adapters.twins.job import Base, MergedTwin, MergeOrder, Work, merge
from manylora_server.adapters.twins.policy import AutoMerge
from manylora_server.adapters.twins.record import TwinRecord
from manylora_server.core.errors import (
    AdapterConflictError,
    EngineFailureError,
    ManyloraError,
)
from manylora_server.core.observer import EngineObserver
from manylora_server.model.runner import ModelRunner
from manylora_server.model.twin.pace import Pace

logger = logging.getLogger(__name__)

_MIB = 1024**2


class _Job:
    """One merge under way. ``bytes`` are what its twin will take, once that is known."""

    def __init__(self, order: MergeOrder) -> None:
        self.order = order
        self.futures: list[Future[TwinRecord]] = []
        self.work: Work[MergedTwin] | None = None
        self.bytes = 0
        self.waits = False


class Twins:
    """Owned by the engine's thread. Twins belong to a revision's digest, never to a name.

    ``records``, and ``merging`` (digests of what is being merged or waits for it), are replaced,
    never changed, so that any thread may read them. Merges are done one
    after another, in pieces between steps; a twin is put in place, and taken away, between two
    steps. Of the base nothing is written.
    """

    def __init__(
        self,
        base: Base,
        residency: Residency,
        max_bytes: int,
        observer: EngineObserver,
        policy: AutoMerge | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.records: Mapping[str, TwinRecord] = {}
        self.merging: tuple[str, ...] = ()
        self.pace = Pace()
        self._base = base
        self._residency = residency
        self._observer = observer
        self._policy = policy
        # Told of every twin that steps no longer use.
        self.on_dropped: Callable[[str], None] = lambda digest: None
        self._twins: dict[str, MergedTwin] = {}
        self._jobs: list[_Job] = []
        # Weights of dropped twins: giving back hundreds of megabytes at once would be felt.
        self._leaving: list[torch.Tensor] = []
        self._gone: list[Future[None]] = []
        self.merged_steps = 0
        self.fused_steps = 0

    @property
    def busy(self) -> bool:
        """Whether a twin is being made or waits to be, or one's memory is being freed."""
        return bool(self._jobs or self._leaving)

    @property
    def waits(self) -> bool:
        """Whether all that is to be done waits for an adapter to be loaded."""
        return not self._leaving and (not self._jobs or self._jobs[0].waits)

    @property
    def bytes(self) -> int:
        """What all twins take, those that are being made, or freed, included."""
        made = sum(twin.record.bytes for twin in self._twins.values())
        leaving = sum(weight.numel() * weight.element_size() for weight in self._leaving)
        return made + leaving + sum(job.bytes for job in self._jobs)

    def merge(self, order: MergeOrder) -> Future[TwinRecord]:
        """Have a twin made; the result comes when steps may use it.

        A twin of that precision that is there already is the result. One of another precision is
        used until the new one takes its place. The future raises ``ManyloraError``.
        """
        future: Future[TwinRecord] = Future()
        present = self._twins.get(order.digest)
        if present is not None and present.record.precision == order.precision:
            future.set_result(self._kept(present, order))
            return future
        job = next((job for job in self._jobs if job.order.digest == order.digest), None)
        if job is None:
            job = _Job(order)
            self._jobs.append(job)
            self._note_jobs()
        elif (job.order.precision, job.order.force) != (order.precision, order.force):
            future.set_exception(
                AdapterConflictError(
                    f"precision: the adapter is being merged as {job.order.precision} now; wait "
                    "for it, or unmerge it first.",
                    param="precision",
                )
            )
            return future
        job.futures.append(future)
        return future

    def drop(self, digest: str) -> bool:
        """Take the adapter's twin away, and stop making one; false: neither was there.

        Requests go on with the base and the adapter's deltas from the next step on. The memory
        comes back between steps; ``freed`` says when.
        """
        stopped = [job for job in self._jobs if job.order.digest == digest]
        for job in stopped:
            self._end(job, AdapterConflictError("name: the merge was called off.", param="name"))
        dropped = self._twins.pop(digest, None)
        if dropped is not None:
            self.on_dropped(digest)
            logger.info("adapter %s: its twin is dropped", digest[:12])
            self._leaving.extend(dropped.weights)
            self._publish()
        return dropped is not None or bool(stopped)

    def freed(self) -> Future[None]:
        """Return what is done once all dropped twins have given their memory back."""
        future: Future[None] = Future()
        if self._leaving:
            self._gone.append(future)
        else:
            future.set_result(None)
        return future

    def refuse_all(self, error: ManyloraError) -> None:
        """Answer all merges under way with ``error``: there will be no more steps."""
        for job in [*self._jobs]:
            self._end(job, error)
        self._leaving.clear()
        self._settle_freed()

    def runner_for(self, digests: set[str | None], tokens: int) -> ModelRunner | None:
        """Return what a step over ``tokens`` of requests for ``digests`` is to use.

        ``None`` is the base with deltas: for a mixed step, and where that was measured faster.
        """
        if not self._twins or len(digests) != 1:
            return None
        (digest,) = digests
        twin = None if digest is None else self._twins.get(digest)
        if twin is None:
            return None
        if not twin.record.choice.merged_is_faster(tokens):
            self.fused_steps += 1
            return None
        self.merged_steps += 1
        return twin.runner

    def note_step(self, digests: set[str | None], tokens: int, seconds: float) -> None:
        """Take note of a step over ``tokens`` of requests for ``digests``."""
        self.pace.note_step(seconds)
        if self._policy is not None:
            alone = next(iter(digests)) if len(digests) == 1 else None
            self._policy.note_step(alone, tokens, seconds)

    def advance(self, *, idle: bool) -> None:
        """Go on with what is being made, for as long as is not felt; longer if ``idle``."""
        if self._policy is not None:
            self._follow(self._policy)
        until = time.perf_counter() + self.pace.begin(idle=idle)
        if self._leaving:
            self._free_one()
            while self._leaving and time.perf_counter() < until:
                self._free_one()
            if self._leaving:
                return
            self._settle_freed()
        while self._jobs:
            if not self._advance(self._jobs[0]) or time.perf_counter() >= until:
                return

    def stats(self) -> dict[str, Any]:
        """Return what there is and what steps used, JSON-ready. Any thread."""
        records = self.records
        return {
            "twins": {digest: record.as_dict() for digest, record in records.items()},
            "bytes": sum(record.bytes for record in records.values()),
            "bytes_limit": self.max_bytes,
            "merging": list(self.merging),
            "merged_steps": self.merged_steps,
            "fused_steps": self.fused_steps,
            "automatic": {"enabled": False} if self._policy is None else self._policy.stats(),
        }

    def _follow(self, policy: AutoMerge) -> None:
        """Do what the policy decides, if it decides anything now."""
        decision = policy.decide(self.records, self.max_bytes - self.bytes, busy=self.busy)
        if decision is None:
            return
        logger.info(
            "automatic merging: %s adapter %s, which is %s",
            decision.action,
            decision.digest[:12],
            decision.reason,
        )
        self._observer.on_auto_merge(decision.action)
        if decision.action == "promote":
            order = MergeOrder(decision.digest, self._base.automatic_precision, automatic=True)
            self.merge(order)
        else:
            self.drop(decision.digest)

    def _advance(self, job: _Job) -> bool:
        """Do one piece; false if nothing can be done before others have done something."""
        digest = job.order.digest
        if job.work is None:
            job.work = merge(
                job.order,
                self._base,
                self._residency,
                self.pace,
                lambda size: self._claim(job, size),
            )
        try:
            go_on = next(job.work)
        except StopIteration as end:
            self._finish(job, end.value)
            return True
        except ManyloraError as error:
            self._end(job, error)
            return True
        except Exception as error:
            logger.exception("adapter %s could not be merged", digest[:12])
            self._end(job, EngineFailureError(f"the merge failed: {type(error).__name__}"))
            return True
        job.waits = not go_on
        return go_on

    def _claim(self, job: _Job, size: int) -> None:
        free = self.max_bytes - self.bytes
        if size > free:
            if self._policy is not None:
                self._policy.no_room(job.order.digest, size)
            raise AdapterConflictError(
                f"precision: the twin takes {size / _MIB:.1f} MiB as {job.order.precision}, and "
                f"{max(0, free) / _MIB:.1f} of {self.max_bytes / _MIB:.1f} MiB for twins are free; "
                "unmerge another adapter, or start the server with a larger --merge-memory.",
                param="precision",
            )
        job.bytes = size

    def _finish(self, job: _Job, twin: MergedTwin) -> None:
        record = twin.record
        before = self._twins.get(twin.digest)
        if before is not None:
            self._leaving.extend(before.weights)
        if twin.digest in self._twins:
            self.on_dropped(twin.digest)
        self._twins[twin.digest] = twin
        logger.info(
            "adapter %s is merged as %s: %d modules, %.1f MiB in %s, %.1f s; logits differ by "
            "%.1e, %.1f %% of its change survived",
            twin.digest[:12],
            record.precision,
            record.modules,
            record.bytes / _MIB,
            record.storage,
            record.seconds,
            record.error.relative_logit_error,
            100 * record.delta_share,
        )
        # Before whoever waits is told.
        self._publish()
        self._end(job, record)

    def _kept(self, twin: MergedTwin, order: MergeOrder) -> TwinRecord:
        """Return the record of a twin that is asked for again; an operator makes it his own."""
        if twin.record.automatic and not order.automatic:
            record = replace(twin.record, automatic=False)
            self._twins[twin.digest] = replace(twin, record=record)
            self._publish()
            return record
        return twin.record

    def _end(self, job: _Job, outcome: TwinRecord | ManyloraError) -> None:
        if self._policy is not None:
            digest = job.order.digest
            if isinstance(outcome, TwinRecord):
                self._policy.merged(digest, outcome)
            elif job.bytes or not isinstance(outcome, AdapterConflictError):
                self._policy.failed(digest, outcome.message)
        self._jobs.remove(job)
        self._note_jobs()
        if job.work is not None:
            job.work.close()
            self._residency.let_go(job.order.digest)
        for future in job.futures:
            if not future.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, ManyloraError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _free_one(self) -> None:
        # The C library is asked each time: all at the end would hold its lock, and with it a step.
        self._leaving.pop()
        give_memory_back()

    def _settle_freed(self) -> None:
        gone, self._gone = self._gone, []
        for future in gone:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _note_jobs(self) -> None:
        self.merging = tuple(job.order.digest for job in self._jobs)

    def _publish(self) -> None:
        self.records = {digest: twin.record for digest, twin in self._twins.items()}
        self._observer.on_twins(len(self._twins), sum(r.bytes for r in self.records.values()))
