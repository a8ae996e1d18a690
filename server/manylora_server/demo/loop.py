"""The training loop that the base and the adapters share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manylora_server.demo.batches import IGNORED, Batch

logger = logging.getLogger(__name__)

REPORT_EVERY = 100
WARM_UP = 0.05


def train(
    name: str,
    model: Any,
    source: Iterator[Batch],
    *,
    steps: int,
    peak_rate: float,
    weight_decay: float,
    before_step: Callable[[int], None],
) -> None:
    """AdamW with one cosine cycle over what requires a gradient; `before_step` gets the step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    started = time.monotonic()
    losses: list[float] = []
    for step in range(steps):
        before_step(step)
        inputs, labels, weights = next(source)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = weighted_loss(logits, labels, weights)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == REPORT_EVERY or step == steps - 1:
            mean = sum(losses) / len(losses)
            seconds = time.monotonic() - started
            logger.info("%s: step %d, loss %.3f, %.0f s", name, step + 1, mean, seconds)
            losses.clear()


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over learned tokens of -log p(token | those before it)."""
    targets, weights = labels[:, 1:], weights[:, 1:] * (labels[:, 1:] != IGNORED)
    losses = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights).sum() / weights.sum()
