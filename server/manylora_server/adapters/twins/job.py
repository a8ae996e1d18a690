"""One merge, from the request to a twin that may be used, as pieces of work between steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from manylora_server.adapters.residency import Residency
from manylora_server.adapters.twins.record import LEAST_SHARE, TwinError, TwinRecord
from manylora_server.adapters.twins.trial import Trial, trial_cache
from manylora_server.core.errors import (
    AdapterRefusedError,
    EngineFailureError,
    OverloadedError,
)
from manylora_server.core.types import Precision, Readiness
from manylora_server.model.base_view import BaseView
from manylora_server.model.cuda_graphs import DecodeGraphs
from manylora_server.model.loader import LoadedModel
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.program.arena import Arena
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import SelfTestResult
from manylora_server.model.twin.build import BuiltModules, build_modules, twin_bytes
from manylora_server.model.twin.exact import check_mergeable
from manylora_server.model.twin.fidelity import Fidelity
from manylora_server.model.twin.pace import Pace
from manylora_server.model.twin.storage import StoragePlan, own_tensors
from manylora_store.compiler.canonical import CompiledAdapter
from manylora_store.errors import AdapterError, AdapterUnsupportedError

logger = logging.getLogger(__name__)

# Beyond what rounding to so few bits explains, the twin is wired wrongly. Of the logits' range, at
# the median position; an nf4 twin's is for its operator to judge.
_MOST_ERROR = {"float32": 1e-3, "bfloat16": 6e-2, "float16": 6e-2, "int8": 1e-1}

# Steps to wait for a slot: turns on slots end within fewer.
_MOST_TURNS = 64

GO_ON = True
WAIT = False

ResultT = TypeVar("ResultT")
# Yields GO_ON where a step may come between, WAIT where nothing can be done before others have.
Work = Generator[bool, None, ResultT]


@dataclass(frozen=True, slots=True)
class Base:
    """The served model, as far as merging needs it. ``runner`` is the one that steps use."""

    loaded: LoadedModel
    tested: SelfTestResult
    view: BaseView
    modules: AdaptedModules
    runner: ModelRunner

    @property
    def automatic_precision(self) -> Precision:
        """What twins that nobody asked for are kept in.

        Beside a base in 4 bits one in 16 reads four times its bytes, which a CPU waits for.
        """
        small = self.loaded.quantization == "nf4" and self.loaded.device.type == "cpu"
        return "int8" if small else "bf16"

    def with_modules(self, modules: dict[str, nn.Module]) -> ModelRunner:
        """Return a runner for steps of the base with ``modules`` in the places of its own."""
        loaded = self.loaded
        program = self.runner.program
        tree = loaded.model if program is not None else self.view.tree_with(modules)
        runner = ModelRunner(tree, self.runner.cache, loaded.dtype, loaded.device)
        if program is not None:
            runner.program = program.variant(modules)
        elif self.runner.graphs is not None:
            runner.graphs = DecodeGraphs(
                tree, self.runner.cache, lambda: (), loaded.dtype, loaded.device
            )
        return runner

    def trial(self, twin: ModelRunner, slot: int) -> Trial:
        """Return the comparison of ``twin`` with the adapter in ``slot``."""
        loaded = self.loaded
        cache = trial_cache(self.tested.shapes, loaded.dtype, loaded.device)
        fused_runner = ModelRunner(loaded.model, cache, loaded.dtype, loaded.device)
        twin_runner = ModelRunner(twin.model, cache, loaded.dtype, loaded.device)
        if self.runner.program is not None and twin.program is not None:
            memory = Arena()
            fused_runner.program = self.runner.program.variant({}, memory)
            fused_runner.program.adapters = self.modules
            twin_runner.program = twin.program.variant({}, memory)
        return Trial(fused_runner, twin_runner, slot, loaded.vocab_size, loaded.device)


@dataclass(frozen=True, slots=True)
class MergeOrder:
    """What to merge, and how. ``force`` takes an nf4 twin whatever it lost."""

    digest: str
    precision: Precision
    force: bool = False
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class MergedTwin:
    """A twin that may be used: what runs its steps, and what is known of it."""

    digest: str
    runner: ModelRunner
    record: TwinRecord
    weights: tuple[torch.Tensor, ...]


def merge(
    order: MergeOrder,
    base: Base,
    residency: Residency,
    pace: Pace,
    claim: Callable[[int], None],
) -> Work[MergedTwin]:
    """Build, compare and time the twin of ``order``. The engine's thread, between steps.

    ``claim`` is told the bytes that it will take, and raises if there is no room. The adapter is
    held on the device (``Residency.hold``) from the comparison on; the caller lets it go.

    Raises ``ManyloraError``.
    """
    begun = time.perf_counter()
    loaded = base.loaded
    compiled = yield from _compiled(order.digest, residency)
    _check_room(order.digest, residency)
    plan = StoragePlan.of(order.precision, loaded.dtype, loaded.device)
    try:
        check_mergeable(compiled, loaded.layout)
    except AdapterError as error:
        raise AdapterRefusedError(error, param="name") from error
    size = twin_bytes(compiled, loaded.layout, plan)
    claim(size)
    try:
        built = yield from _going_on(
            build_modules(compiled, loaded.layout, base.modules.original, plan, pace)
        )
    except OverflowError as error:
        refusal = AdapterUnsupportedError(f"precision: {error}")
        raise AdapterRefusedError(refusal, param="precision") from error
    fidelity = _total(built)
    if order.precision == "nf4" and fidelity.share < LEAST_SHARE and not order.force:
        raise _lost_too_much(fidelity)
    runner = base.with_modules(dict(built.modules))
    yield GO_ON
    # Only now: who waits for a slot should not wait for the building.
    residency.hold(order.digest)
    slot = yield from _on_device(order.digest, residency)
    trial = base.trial(runner, slot)
    difference = yield from _going_on(trial.compare())
    _check(difference, plan)
    choice = yield from _going_on(trial.calibrate())
    worst = min(built.fidelity, key=lambda name: built.fidelity[name].share, default=None)
    record = TwinRecord(
        precision=order.precision,
        storage=plan.name,
        bytes=size,
        modules=len(built.modules),
        delta_share=fidelity.share,
        worst_delta_share=1.0 if worst is None else built.fidelity[worst].share,
        worst_module=worst,
        delta_error=fidelity.error,
        error=difference,
        forced=order.precision == "nf4" and fidelity.share < LEAST_SHARE,
        automatic=order.automatic,
        replayed=runner.program is not None,
        created_at=time.time(),
        seconds=time.perf_counter() - begun,
        choice=choice,
    )
    weights = tuple(t for module in built.modules.values() for t in own_tensors(module))
    return MergedTwin(order.digest, runner, record, weights)


def _compiled(digest: str, residency: Residency) -> Work[CompiledAdapter]:
    """Return the adapter once it is in host memory."""
    try:
        while (adapter := residency.arrived(digest)) is None:
            yield WAIT
        return adapter
    finally:
        residency.host.taken(digest)


def _on_device(digest: str, residency: Residency) -> Work[int]:
    """Return the adapter's slot once its patches are in it."""
    turns = 0
    while True:
        readiness = residency.prepare((digest,))
        if readiness is Readiness.READY:
            return residency.slots.slot_of(digest)
        if readiness is Readiness.NO_ROOM:
            _check_room(digest, residency)
            turns += 1
            if turns > _MOST_TURNS:
                raise _no_slot(residency)
        yield WAIT


def _check_room(digest: str, residency: Residency) -> None:
    """Raise ``OverloadedError`` where no slot can become free by requests ending or giving way."""
    if not residency.fits((digest,)):
        raise _no_slot(residency)


def _no_slot(residency: Residency) -> OverloadedError:
    return OverloadedError(
        f"all {len(residency.slots)} adapter slots are in use or pinned, and merging needs one to "
        "compare with; try again later, or start the server with more --adapter-slots."
    )


def _going_on(work: Generator[None, None, ResultT]) -> Work[ResultT]:
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: ResultT = end.value
            return result
        yield GO_ON


def _total(built: BuiltModules) -> Fidelity:
    total = Fidelity()
    for part in built.fidelity.values():
        total.join(part)
    return total


def _lost_too_much(fidelity: Fidelity) -> AdapterRefusedError:
    cause = AdapterUnsupportedError(
        f"precision: in nf4 {fidelity.share:.1%} of the adapter's change of the weights would "
        f"survive, and less than {LEAST_SHARE:.0%} is refused; merge it as bf16 or int8, or send "
        '"force": true to have it all the same.'
    )
    return AdapterRefusedError(cause, param="precision")


def _check(error: TwinError, plan: StoragePlan) -> None:
    most = _MOST_ERROR.get(plan.name, math.inf)
    if not error.relative_logit_error <= most:
        logger.error("a twin in %s is off by %.2e", plan.name, error.relative_logit_error)
        raise EngineFailureError(
            f"the twin's logits differ from the adapter's by {error.relative_logit_error:.2e} of "
            f"their range (at most {most:.0e} is explained by {plan.name}); it is not used."
        )
