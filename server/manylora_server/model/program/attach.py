"""Lets a runner replay its model's pass where that can be done and comes out right."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from manylora_kernels import native, nf4_linear_in_float, selected_backend
from manylora_server.model.attention import KVCache
from manylora_server.model.batch import Chunk
from manylora_server.model.loader import LoadedModel
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.program.recorder import NotRecordableError
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import SelfTestResult, relative_error

if TYPE_CHECKING:
    from manylora_server.model.program.program import StepProgram

logger = logging.getLogger(__name__)

# Of the logits' range, as in the self-test: deep random models show rounding at 1e-4.
_TOLERANCE = 1e-3
_BLOCK_TOKENS = 4


def attach_program(
    runner: ModelRunner, loaded: LoadedModel, tested: SelfTestResult, adapters: AdaptedModules
) -> None:
    """Record ``runner``'s pass and use the recording, or log why not."""
    if loaded.device.type != "cpu" or loaded.dtype is not torch.float32 or native.missing:
        return
    if selected_backend("lora_delta_") != native.NATIVE:
        return
    specs = loaded.layout.modules
    modules = {
        name: adapters.original(name)
        for name, spec in specs.items()
        if spec.kind in AdaptedModules.KINDS
    }
    heads = [name for name, spec in specs.items() if spec.is_output_head]
    try:
        program = runner.record(modules, heads[0] if heads else None)
    except NotRecordableError as error:
        logger.info("steps run transformers' own code, which cannot be replayed: %s", error)
        return
    small = KVCache(tested.shapes, 6, _BLOCK_TOKENS, loaded.dtype, loaded.device)
    own, runner.cache = runner.cache, small
    try:
        with nf4_linear_in_float():  # which finds what rounding to eight bits would hide
            difference = _difference(runner, program, loaded.vocab_size)
    finally:
        runner.cache = own
    if not difference <= _TOLERANCE:
        logger.warning(
            "steps run transformers' own code: replayed, its logits differ by %.1e", difference
        )
        return
    program.adapters = adapters
    runner.program = program
    logger.info(
        "steps are replayed natively, %d operators of each by torch; logits differ by %.1e",
        len(program.foreign_calls),
        difference,
    )


def _difference(runner: ModelRunner, program: StepProgram, vocab_size: int) -> float:
    """Return the largest difference between replayed and original logits, over their range."""
    tokens = torch.randint(vocab_size, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = (
        [Chunk(tokens[:7], 0, [1, 2], (), True), Chunk(tokens[:1], 0, [4], (), True)],
        [Chunk(tokens[7:8], 7, [1, 2], (), True)],
        [Chunk(tokens[8:], 8, [1, 2, 3], (), False), Chunk(tokens[1:3], 1, [4], (), True)],
    )
    worst = 0.0
    for step in steps:
        runner.program = program
        try:
            replayed = runner.logits(step).clone()
        finally:
            runner.program = None
        worst = max(worst, relative_error(replayed, runner.logits(step)))
    return worst
