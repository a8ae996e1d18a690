"""Weighted mixes beside single adapters and the base in one batch, against PEFT and plain sums."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora_kernels import native
from manylora_server.core.errors import AdapterRefusedError
from manylora_server.core.types import AdapterMix, Request
from manylora_server.engine.async_engine import AsyncEngine
from manylora_server.engine.kv_blocks import KVBlocks
from support.adapters import adalora, lora, save_adapter, train_biases
from support.mixing import Weights, mix_of, peft_cat, summed
from support.models import VOCAB, save_model
from support.oracle import Oracle, greedy
from support.serving import DEVICE, Recorder, bring_in, build, inner, request, run, tokens_of

NEW_TOKENS = 5
BLOCKS = 20

CAT: dict[str, Any] = {
    "plain": {},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": "all-linear"},
    "wide": {"r": 33, "target_modules": ["q_proj", "lm_head"]},
    "one": {"r": 1, "lora_alpha": 3, "layers_to_transform": [1]},
}
# PEFT computes a mix under the settings of its first adapter, so that must be no rsLoRA, and not of
# some layers only.
MIXES: dict[str, Weights] = {
    "two": {"plain": 0.7, "rslora": 0.3},
    "negative": {"wide": -1.25, "rslora": 0.6},
    "all": {"wide": 0.5, "one": -2.0, "rslora": 0.25, "plain": 1.5},
    "half": {"plain": 0.5},
}


def serve_all(
    engine: AsyncEngine, mixes: dict[str, Weights], names: list[str | None]
) -> tuple[dict[str, tuple[str, list[int]]], dict[str, list[int]], Recorder]:
    """Run everything in one mixed batch with too few blocks; return what was asked and came."""
    core = inner(engine)
    core.scheduler.blocks = KVBlocks(BLOCKS, 4)
    recorder = Recorder(core)
    rng = random.Random(2)
    asked: dict[str, tuple[str, list[int]]] = {}
    arrivals: dict[int, list[Request]] = {}
    for number, name in enumerate([*mixes, *names] * 3):
        prompt = rng.choices(range(3, VOCAB), k=rng.randint(4, 19))
        request_id = f"{name}-{number}"
        adapter: AdapterMix | None = None
        if name in mixes:
            adapter = mix_of(engine, mixes[name])
        elif name is not None:
            adapter = AdapterMix.of(engine.adapters.resolve(name))
        asked[request_id] = (str(name), prompt)
        arriving = request(request_id, prompt, adapter, max_tokens=NEW_TOKENS)
        arrivals.setdefault(number // 4, []).append(arriving)
    outputs = run(core, arrivals)
    assert core.scheduler.preemptions > 0, "nothing was preempted"
    held = [{chunk.adapters for chunk in step} for step in recorder.steps]
    assert max(len(adapters) for adapters in held) >= 4, "the batches were hardly mixed"
    core._runner = recorder._runner
    return asked, {key: tokens_of(value) for key, value in outputs.items()}, recorder


def check(
    models: dict[str, Any], served: tuple[dict[str, tuple[str, list[int]]], Any, Recorder]
) -> None:
    asked, tokens, recorder = served
    seen: dict[str, torch.Tensor] = {}
    for request_id, (name, prompt) in asked.items():
        expected, logits = greedy(models[name], prompt, NEW_TOKENS)
        assert tokens[request_id] == expected, request_id
        got = torch.stack(recorder.rows[request_id])
        error = float((got - logits).abs().max() / logits.abs().max())
        assert error < 1e-4, (request_id, error)
        seen[name] = logits
    assert len({tuple(rows[0].tolist()) for rows in seen.values()}) == len(seen)


@pytest.mark.parametrize("replayed", [True, False], ids=["replayed", "plain"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_mixes_equal_peft_s_concatenation(
    quantization: str, replayed: bool, tmp_path: Path
) -> None:
    if replayed and native.missing is not None:
        pytest.skip("programs need the native kernels")
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        name: save_adapter(base, lora("llama", **changes), tmp_path / name, seed)
        for seed, (name, changes) in enumerate(CAT.items())
    }
    engine = build(
        folder,
        tmp_path / "home",
        quantization=quantization,
        device="cpu" if replayed else DEVICE,
        adapters=adapters,
        max_batch_tokens=24,
        kv_block_tokens=4,
    )
    bring_in(engine)
    runner = inner(engine)._runner
    if replayed:
        assert runner.program is not None  # type: ignore[attr-defined]
    else:
        runner.program = None  # type: ignore[attr-defined]
    served = serve_all(engine, MIXES, [None, "plain", "wide"])
    oracle = Oracle(folder, quantization, adapters)
    models: dict[str, Any] = {
        name: peft_cat(folder, quantization, adapters, weights) for name, weights in MIXES.items()
    }
    models |= {"None": oracle.model(None)}
    models |= {name: oracle.model(name) for name in ("plain", "wide")}
    check(models, served)


SUMMED: dict[str, tuple[dict[str, Any], dict[str, Weights]]] = {
    "llama": (
        {
            "plain": lora("llama", target_modules="all-linear"),
            "adalora": adalora("llama"),
            "embeddings": lora("llama", target_modules=["embed_tokens", "q_proj", "lm_head"]),
            "patterns": lora("llama", r=2, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 3}),
            "rslora": lora("llama", r=8, use_rslora=True),
        },
        {
            "adalora-twice": {"adalora": 1.5, "plain": -0.5},
            "embeddings-and-more": {"embeddings": 0.6, "patterns": 0.9, "adalora": 0.25},
            "embeddings-half": {"embeddings": 0.5},
            "rslora-half": {"rslora": 0.5},
        },
    ),
    "qwen2": (
        {
            "biases": lora("qwen2", bias="all"),
            "own-biases": lora("qwen2", bias="lora_only", r=7),
            "lora-bias": lora("qwen2", lora_bias=True),
        },
        {
            "biases-twice": {"biases": 0.7, "own-biases": -0.4},
            "biases-thrice": {"lora-bias": 1.5, "biases": 0.3, "own-biases": 0.2},
            "bias-half": {"lora-bias": 0.5},
        },
    ),
    # Its norms have biases, which a bias of "all" trains as well.
    "gpt2": (
        {
            "biases": lora("gpt2", bias="all"),
            "more-biases": lora("gpt2", bias="all", r=2, target_modules=["c_attn", "c_proj"]),
        },
        {
            "norm-biases": {"biases": 0.7, "more-biases": -0.4},
            "norm-bias-half": {"biases": 0.5},
        },
    ),
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", SUMMED)
def test_mixes_equal_the_sum_of_deltas(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    configs, mixes = SUMMED[architecture]
    folder = tmp_path / "base"
    base = save_model(architecture, folder)
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    for seed, path in enumerate(adapters.values()):
        train_biases(path, seed)
    engine = build(
        folder,
        tmp_path / "home",
        quantization=quantization,
        adapters=adapters,
        max_batch_tokens=24,
        kv_block_tokens=4,
    )
    bring_in(engine)
    single = next(iter(configs))
    served = serve_all(engine, mixes, [None, single])
    oracle = Oracle(folder, quantization, adapters)
    models: dict[str, Any] = {
        name: summed(folder, quantization, adapters, weights) for name, weights in mixes.items()
    }
    models |= {"None": oracle.model(None), single: oracle.model(single)}
    check(models, served)


@pytest.mark.skipif(native.missing is not None, reason="only native kernels keep a row's bits")
def test_a_mix_has_the_same_bits_in_any_company_and_any_order(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model("llama", folder, stored=torch.bfloat16)
    adapters = {
        name: save_adapter(base, lora("llama", **changes), tmp_path / name, seed)
        for seed, (name, changes) in enumerate(CAT.items())
    }
    prompt = [40, 41, 42, 43, 44, 45, 46]
    weights = {"plain": 0.7, "wide": -0.3, "rslora": 0.1}

    def rows(mixes: list[Weights], loaded: list[str], **limits: Any) -> dict[str, torch.Tensor]:
        engine = build(
            folder,
            tmp_path / "home",
            quantization="nf4",
            device="cpu",
            adapters=adapters,
            **limits,
        )
        core = inner(engine)
        for name in loaded:
            # Which slot an adapter has must not matter.
            run(core, {0: [request(name, [5], engine.adapters.resolve(name), max_tokens=1)]})
        recorder = Recorder(core)
        requests = [
            request(f"{number}", prompt, mix_of(engine, mix), max_tokens=12)
            for number, mix in enumerate(mixes)
        ]
        run(core, {0: requests[:2], 1: requests[2:]})
        return {key: torch.stack(value) for key, value in recorder.rows.items()}

    alone = rows([weights], ["plain", "rslora", "wide"])["0"]
    turned = dict(reversed(weights.items()))
    others: list[Weights] = [{"one": 1.0}, {"wide": -0.3, "plain": 0.7}, {"rslora": 2.0}]
    together = rows([turned, *others, weights], ["wide", "one", "rslora"], max_batch_tokens=11)
    assert torch.equal(together["0"], alone)
    assert torch.equal(together["4"], alone)
    assert not torch.equal(together["2"], alone)


def test_a_mix_s_prefix_is_reused_by_that_mix_only(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        name: save_adapter(base, lora("llama", r=2 + seed), tmp_path / name, seed)
        for seed, name in enumerate("ab")
    }
    engine = build(folder, tmp_path / "home", adapters=adapters, kv_block_tokens=4)
    core = inner(engine)
    prompt = list(range(50, 71))
    first: dict[str, list[int]] = {}
    asked: list[tuple[Weights, int]] = [
        ({"a": 0.7, "b": 0.3}, 0),
        ({"a": 0.3, "b": 0.7}, 0),
        ({"a": 0.7}, 0),
        ({"a": 1.0}, 0),
        ({"b": 0.3, "a": 0.7}, 20),
        ({"a": 1.0, "b": 0.0}, 20),
    ]
    for weights, cached in asked:
        mix = mix_of(engine, weights)
        outputs = run(core, {0: [request("it", prompt, mix, max_tokens=6)]})["it"]
        assert outputs[-1].cached_tokens == cached, weights
        tokens = tokens_of(outputs)
        assert first.setdefault(str(mix.key), tokens) == tokens
    assert len({tuple(tokens) for tokens in first.values()}) == len(first)


def test_what_is_not_linear_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model("gpt2", folder)
    configs = {
        "linear": lora("gpt2", bias="all"),
        "dora": lora("gpt2", use_dora=True),
        "saved": lora("gpt2", modules_to_save=["ln_f"]),
    }
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    engine = build(folder, tmp_path / "home", adapters=adapters)
    reasons = {
        "dora": "it scales the outputs of 'transformer.h.0.attn.c_attn' and 1 more (DoRA)",
        "saved": "it replaces the weights of 'transformer.ln_f'",
    }
    for name, reason in reasons.items():
        with pytest.raises(AdapterRefusedError) as caught:
            mix_of(engine, {"linear": 0.5, name: 0.5})
        assert f"adapter: '{name}' cannot be part of a mix" in caught.value.message
        assert reason in caught.value.message
        record = engine.adapters.get(name)
        assert record is not None
        assert record.unmixable is not None
        assert reason in record.unmixable
    linear = engine.adapters.get("linear")
    assert linear is not None
    assert linear.unmixable is None
    assert mix_of(engine, {"dora": 1.0}).plain


def test_an_adapter_of_an_earlier_version_is_examined_when_it_is_added_again(
    tmp_path: Path,
) -> None:
    folder, home = tmp_path / "base", tmp_path / "home"
    base = save_model("llama", folder)
    adapters = {"a": save_adapter(base, lora("llama"), tmp_path / "a", 1)}
    build(folder, home, adapters=adapters).close()
    with closing(sqlite3.connect(home / "registry.sqlite3")) as registry, registry:
        registry.execute("UPDATE revisions SET facts = json_remove(facts, '$.unmixable')")
    engine = build(folder, home)
    assert mix_of(engine, {"a": 1.0}).plain
    with pytest.raises(AdapterRefusedError, match="add it again to have it examined"):
        mix_of(engine, {"a": 0.5})
    engine.close()
    engine = build(folder, home, adapters=adapters)
    assert not mix_of(engine, {"a": 0.5}).plain
    engine.close()
