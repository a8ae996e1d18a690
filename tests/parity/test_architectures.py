"""Mixed batches against transformers + PEFT, one request at a time, for every architecture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from manylora_server.core.types import Request
from manylora_server.engine.kv_blocks import KVBlocks
from manylora_server.model.architectures import SUPPORTED_MODEL_TYPES
from support.adapters import adalora, attention_targets, lora, save_adapter
from support.models import ARCHITECTURES, VOCAB, save_model
from support.oracle import Oracle, greedy
from support.serving import Recorder, bring_in, build, inner, request, run, tokens_of

NEW_TOKENS = 8
BLOCKS = 30
MIXTURES = {"mixtral", "qwen3_moe"}


def test_every_supported_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) == SUPPORTED_MODEL_TYPES


def kinds(architecture: str) -> dict[str, object]:
    """Adapters of different kinds, ranks and targets for one architecture."""
    targets = attention_targets(architecture)
    # On mixtures of experts PEFT's "all-linear" also wraps the experts' 3-d parameters.
    wide = [*targets, "k_proj", "o_proj"] if architecture in MIXTURES else "all-linear"
    return {
        "plain": lora(architecture),
        "rslora": lora(architecture, r=8, use_rslora=True, target_modules=wide),
        "dora": lora(architecture, r=3, use_dora=True, target_modules=wide),
        "adalora": adalora(architecture),
        "patterns": lora(
            architecture,
            r=2,
            rank_pattern={targets[0]: 5},
            alpha_pattern={targets[0]: 3},
            layers_to_transform=[1],
        ),
    }


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_mixed_batch_equals_peft(architecture: str, quantization: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model(architecture, folder)
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(kinds(architecture).items())
    }
    engine = build(
        folder,
        tmp_path / "home",
        quantization=quantization,
        adapters=adapters,
        max_batch_tokens=24,
        kv_block_tokens=4,
        max_sequences=8,
    )
    bring_in(engine)
    core = inner(engine)
    # So few blocks that sequences must be preempted; no more than the cache really has.
    core.scheduler.blocks = KVBlocks(BLOCKS, 4)
    recorder = Recorder(core)
    rng = random.Random(1)
    prompts = {
        f"{name or 'base'}-{copy}": (name, rng.choices(range(3, VOCAB), k=rng.randint(3, 23)))
        for name in [None, *adapters]
        for copy in range(2)
    }
    arrivals: dict[int, list[Request]] = {}
    for step, (request_id, (name, prompt)) in enumerate(prompts.items()):
        choice = None if name is None else engine.adapters.resolve(name)
        arriving = request(request_id, prompt, choice, max_tokens=NEW_TOKENS)
        arrivals.setdefault(step // 2, []).append(arriving)
    outputs = run(core, arrivals)

    mixed = [{chunk.adapters for chunk in step} for step in recorder.steps]
    assert max(len(slots) for slots in mixed) >= 4, "the batches were hardly mixed"
    assert core.scheduler.preemptions > 0, "nothing was preempted"
    oracle = Oracle(folder, quantization, adapters)
    for name in [None, *adapters]:
        model = oracle.model(name)
        for request_id, (owner, prompt) in prompts.items():
            if owner == name:
                expected, logits = greedy(model, prompt, NEW_TOKENS)
                assert tokens_of(outputs[request_id]) == expected, request_id
                got = torch.stack(recorder.rows[request_id])
                error = float((got - logits).abs().max() / logits.abs().max())
                assert error < 1e-4, (request_id, error)
