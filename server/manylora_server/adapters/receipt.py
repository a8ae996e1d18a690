"""An adapter's receipt: how far the server's result for it is from PEFT's, on this very base.

``ReceiptMeter.prepare`` builds two models over the weights in memory, neither of which the engine
knows: one with the adapter in a slot of its own, as the server runs it, and a ``PeftModel``. The
``Measurement`` runs a few canary prompts through both and compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from manylora_kernels import nf4_linear_in_float
from manylora_server.adapters.canary import OwnRoute, canary_prompts, own_route
from manylora_server.model.base_view import BaseView
from manylora_server.model.loader import LoadedModel
from manylora_server.model.self_test import SelfTestResult
from manylora_store.compiler.canonical import CompiledAdapter
from manylora_store.errors import AdapterInvalidError

if TYPE_CHECKING:
    from manylora_server.adapters.reference import PeftRoute

# Of the range of PEFT's logits; the self-test at load allows the base as much.
_MOST_IN_FLOAT32 = 1e-3
_MOST_IN_16_BITS = 6e-2
# An adapter that changes little must be right in the little that it changes: beyond rounding, no
# error may be larger than this share of its effect.
_SHARE_OF_EFFECT = 0.05
# Rounding is taken to explain this share of the most, and this multiple of the base's own error.
_ROUNDING_SHARE = 0.1
_ROUNDING_FACTOR = 3


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was measured, at ``positions`` positions of all prompts together.

    A position's error is the largest difference between the server's logits and PEFT's; relative
    to the range (largest less smallest) of PEFT's logits there. ``relative_logit_error`` is that of
    the median position, and ``threshold`` what was allowed. The largest error decides nothing:
    rounding alone makes single positions jump, where the choice of an expert or attention's choice
    between two tokens is a near tie. ``effect`` is PEFT's difference from the base, relative and of
    the median position too. ``kl_divergence``, of the server's next-token distribution from PEFT's,
    is the largest of all positions, in nats; ``top_token_agreement`` the share of positions where
    both prefer the same token. ``seconds`` does not count waiting.
    """

    prompts: int
    tokens: int
    positions: int
    max_abs_logit_error: float
    relative_logit_error: float
    largest_relative_logit_error: float
    kl_divergence: float
    top_token_agreement: float
    effect: float
    threshold: float
    dtype: str
    quantization: Literal["nf4", "none"]
    peft_version: str
    measured_at: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON-ready types."""
        return asdict(self)


class ReceiptMeter:
    """Measures adapters against PEFT on the loaded base. Thread-safe."""

    def __init__(self, loaded: LoadedModel, tested: SelfTestResult, view: BaseView) -> None:
        self.loaded = loaded
        self.view = view
        self.prompts = canary_prompts(loaded.vocab_size)
        # The base's logits on the prompts, once an adapter was measured.
        self.base_logits: torch.Tensor | None = None
        self._tested = tested

    def prepare(self, folder: Path, compiled: CompiledAdapter) -> Measurement:
        """Build what is needed to measure the adapter in ``folder``, which is ``compiled``.

        Copies the adapter's tensors, so call it in a thread that is limited to one torch thread.

        Raises:
            AdapterInvalidError: PEFT cannot load it, or it holds a value that is not finite in the
                base's dtype.
        """
        # PEFT takes seconds to import, and a server to which nobody brings adapters needs none.
        from manylora_server.adapters.reference import peft_route

        start = time.perf_counter()
        base = self.route(None) if self.base_logits is None else None
        try:
            own = self.route(compiled)
        except OverflowError as error:
            raise AdapterInvalidError(f"receipt: {error}") from error
        peft = peft_route(self.view, self.loaded, self.prompts, folder, compiled.record)
        return Measurement(self, base, own, peft, time.perf_counter() - start)

    def allowed(self, effect: float) -> float:
        """Return the median relative error allowed to an adapter of this ``effect``."""
        most = _MOST_IN_FLOAT32 if self.loaded.dtype == torch.float32 else _MOST_IN_16_BITS
        rounding = max(_ROUNDING_SHARE * most, _ROUNDING_FACTOR * self._tested.error)
        return min(most, max(rounding, _SHARE_OF_EFFECT * effect))

    def route(self, adapter: CompiledAdapter | None) -> OwnRoute:
        """Return the canary prompts with ``adapter``, ready for one pass as the server runs it.

        ``OverflowError`` if it holds a value that is not finite in the base's dtype.
        """
        return own_route(self.view, self.loaded, self._tested, self.prompts, adapter)


class Measurement:
    """One adapter on its way to a receipt: run ``steps`` in order, then ``finish``.

    Each step is one pass of the model over some fifty tokens. Run it in the engine's thread, or in
    a thread that is limited to one torch thread.
    """

    def __init__(
        self,
        meter: ReceiptMeter,
        base: OwnRoute | None,
        own: OwnRoute,
        peft: PeftRoute,
        seconds: float,
    ) -> None:
        self._meter = meter
        self._seconds = seconds
        self._logits: dict[str, torch.Tensor] = {}
        # What a step was made of goes with it, so that the adapter's copies go as soon as they can.
        self._routes: dict[str, OwnRoute | PeftRoute] = {} if base is None else {"base": base}
        self._routes |= {"own": own, "peft": peft}

    @property
    def steps(self) -> tuple[Callable[[], None], ...]:
        """What remains to be run."""
        return tuple(partial(self._run, name) for name in self._routes)

    def finish(self) -> Receipt:
        """Compare (any thread).

        Raises:
            AdapterInvalidError: a logit is not finite, or the error is larger than is allowed.
        """
        meter = self._meter
        assert not self._routes, "every step must have been run"
        assert meter.base_logits is not None
        with self._timed():
            got, expected = self._logits["own"], self._logits["peft"]
            _check_finite("the server's", got, meter.loaded.dtype)
            _check_finite("PEFT's", expected, meter.loaded.dtype)
            scale = (expected.amax(1) - expected.amin(1)).clamp_min(1e-6)
            error = (got - expected).abs().amax(1)
            relative = error / scale
            effect = float(((expected - meter.base_logits).abs().amax(1) / scale).median())
            largest = max(map(divergence, expected, got))
            agreement = float((expected.argmax(1) == got.argmax(1)).double().mean())
            median, threshold = float(relative.median()), meter.allowed(effect)
        if median > threshold:
            raise AdapterInvalidError(
                f"receipt: logits with this adapter differ from PEFT's by {median:.2e} of their"
                f" range; at most {threshold:.2e} is allowed (the adapter's effect is"
                f" {effect:.2e}). It would be served wrongly."
            )
        return Receipt(
            prompts=len(meter.prompts),
            tokens=sum(len(prompt) for prompt in meter.prompts),
            positions=len(expected),
            max_abs_logit_error=float(error.max()),
            relative_logit_error=median,
            largest_relative_logit_error=float(relative.max()),
            kl_divergence=largest,
            top_token_agreement=agreement,
            effect=effect,
            threshold=threshold,
            dtype=_name(meter.loaded.dtype),
            quantization="nf4" if meter.view.quantized else "none",
            peft_version=version("peft"),
            measured_at=time.time(),
            seconds=self._seconds,
        )

    def _run(self, name: str) -> None:
        # Rounding to eight bits would hide what a receipt is to find.
        with self._timed(), nf4_linear_in_float():
            logits = self._routes.pop(name).logits()
        if name == "base":
            self._meter.base_logits = logits
        else:
            self._logits[name] = logits

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


def _check_finite(whose: str, logits: torch.Tensor, dtype: torch.dtype) -> None:
    bad = int((~logits.isfinite()).sum())
    if bad:
        raise AdapterInvalidError(
            f"receipt: with this adapter {bad} of {logits.numel()} of {whose} logits are not finite"
            f" in {_name(dtype)}"
        )


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the KL divergence between the softmaxes of two rows of logits, in nats."""
    p, q = expected.double().log_softmax(0), got.double().log_softmax(0)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
