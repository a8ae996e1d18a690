"""Every adapter feature, all of one base's adapters in one mixed batch, against PEFT one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.adapters import attention_targets, lora, save_adapter
from support.models import save_model
from support.oracle import Oracle, greedy
from support.serving import Recorder, build, inner, request, run, tokens_of

NEW_TOKENS = 6
PROMPTS = ([5, 60, 7, 200, 31], [9, 9, 100, 101, 102, 103, 104, 105, 40, 41, 42])


def features(architecture: str) -> dict[str, Any]:
    """Adapters that use one special feature each."""
    targets = attention_targets(architecture)
    gpt2 = architecture == "gpt2"
    embedding = "wte" if gpt2 else "embed_tokens"
    norm = "ln_f" if gpt2 else "norm"
    layers = r".*h\.1\." if gpt2 else r".*layers\.1\."
    found: dict[str, Any] = {
        "embeddings": lora(architecture, target_modules=[embedding, *targets]),
        "head": lora(architecture, r=5, target_modules=["lm_head", *targets]),
        "regex": lora(architecture, target_modules=layers + f"(attn|self_attn).({targets[0]})"),
        "saved-head": lora(architecture, modules_to_save=["lm_head"]),
        "saved-embeddings": lora(architecture, modules_to_save=[embedding]),
        "saved-norm": lora(architecture, modules_to_save=[norm]),
        "lora-bias": lora(architecture, lora_bias=True),
        "rank-one": lora(architecture, r=1, lora_alpha=1),
        "rank-33": lora(architecture, r=33, use_rslora=True),
    }
    if not gpt2:
        found["dora-embeddings"] = lora(
            architecture, target_modules=[embedding, *targets], use_dora=True
        )
    if architecture in {"qwen2", "gpt2"}:
        found["biases"] = lora(architecture, bias="all")
        found["own-biases"] = lora(architecture, bias="lora_only")
    return found


# A checkpoint of 16 bits goes through other dense layers.
@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        ("none", torch.float32),
        ("nf4", torch.float32),
        ("none", torch.bfloat16),
        ("nf4", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_features_equal_peft(
    architecture: str, quantization: str, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    base = save_model(architecture, folder, stored=stored)
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(features(architecture).items())
    }
    engine = build(
        folder, tmp_path / "home", quantization=quantization, adapters=adapters, max_batch_tokens=48
    )
    core = inner(engine)
    recorder = Recorder(core)
    requests = [
        request(
            f"{name}/{index}",
            prompt,
            None if name == "base" else engine.adapters.resolve(name),
            max_tokens=NEW_TOKENS,
        )
        for index, prompt in enumerate(PROMPTS)
        for name in ["base", *adapters]
    ]
    outputs = run(core, {0: requests[::2], 2: requests[1::2]})
    oracle = Oracle(folder, quantization, adapters)
    base_tokens = {}
    for name in ["base", *adapters]:
        model = oracle.model(None if name == "base" else name)
        for index, prompt in enumerate(PROMPTS):
            request_id = f"{name}/{index}"
            expected, logits = greedy(model, prompt, NEW_TOKENS)
            assert tokens_of(outputs[request_id]) == expected, request_id
            got = torch.stack(recorder.rows[request_id])
            assert float((got - logits).abs().max() / logits.abs().max()) < 1e-4, request_id
            if name == "base":
                base_tokens[index] = logits
            else:
                assert not torch.allclose(logits, base_tokens[index]), "the adapter does nothing"


def test_an_adapter_s_output_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    configs = {
        "a": lora("llama"),
        "b": lora("llama", r=8, use_dora=True, target_modules="all-linear"),
        "c": lora("llama", r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    }
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(configs.items())
    }

    def tokens(names: list[str | None], **limits: Any) -> dict[str, list[int]]:
        engine = build(folder, tmp_path / "home", adapters=adapters, **limits)
        requests = [
            request(
                str(name),
                [40, 41, 42, 43, 44, 45, 46],
                None if name is None else engine.adapters.resolve(name),
                max_tokens=24,
            )
            for name in names
        ]
        return {k: tokens_of(v) for k, v in run(inner(engine), {0: requests}).items()}

    together = tokens(["a", None, "b", "c"])
    for name in ["a", None, "b", "c"]:
        assert tokens([name])[str(name)] == together[str(name)]
    assert tokens(["c", "b", None, "a"], max_batch_tokens=3) == together


def test_more_adapters_than_slots_and_shared_prefixes(tmp_path: Path) -> None:
    """Adapters come and go through two slots; prefixes are shared within one adapter only."""
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        f"a{seed}": save_adapter(base, lora("llama", r=seed + 1), tmp_path / f"a{seed}", seed)
        for seed in range(6)
    }
    engine = build(folder, tmp_path / "home", adapters=adapters, adapter_slots=2, kv_block_tokens=4)
    core = inner(engine)
    prompt = list(range(50, 71))
    oracle = Oracle(folder, "none", adapters)
    expected = {name: greedy(oracle.model(name), prompt, 5)[0] for name in adapters}
    for round_ in range(2):
        requests = [
            request(f"{name}-{round_}", prompt, engine.adapters.resolve(name), max_tokens=5)
            for name in adapters
        ]
        outputs = run(core, {0: requests})
        for name in adapters:
            got = outputs[f"{name}-{round_}"]
            assert tokens_of(got) == expected[name]
            assert got[-1].cached_tokens == (20 if round_ else 0)
