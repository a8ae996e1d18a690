"""The engine on a CUDA device against transformers + PEFT on the CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.adapters import lora, save_adapter
from support.models import save_model
from support.oracle import Oracle, greedy
from support.serving import Recorder, bring_in, build, inner, request, run, tokens_of

pytestmark = pytest.mark.gpu

PROMPTS = ([5, 60, 7, 200, 31], [9, 9, 100, 101, 102, 103, 104, 105, 40, 41, 42])
# Largest logit error over the largest logit. In half precision the reference itself is rounded
# at every layer, so only the size of the error is meaningful, not the tokens.
LIMITS = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1.5e-1}


@pytest.mark.parametrize("dtype", sorted(LIMITS))
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "qwen3_moe"])
def test_mixed_batch_on_the_gpu(
    architecture: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    base = save_model(architecture, folder)
    configs = {
        "plain": lora(architecture),
        "rslora": lora(architecture, r=8, use_rslora=True),
        "dora": lora(architecture, r=3, use_dora=True),
    }
    adapters = {
        name: save_adapter(base, config, tmp_path / name, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    engine = build(
        folder,
        tmp_path / "home",
        quantization=quantization,
        device="cuda",
        dtype=dtype,
        adapters=adapters,
        max_batch_tokens=24,
    )
    core = inner(engine)
    recorder = Recorder(core)
    requests = [
        request(
            f"{name}/{index}",
            prompt,
            None if name == "base" else engine.adapters.resolve(name),
            max_tokens=6,
        )
        for index, prompt in enumerate(PROMPTS)
        for name in ["base", *adapters]
    ]
    outputs = run(core, {0: requests[::2], 2: requests[1::2]})
    oracle = Oracle(folder, quantization, adapters)
    for name in ["base", *adapters]:
        model = oracle.model(None if name == "base" else name)
        for index, prompt in enumerate(PROMPTS):
            request_id = f"{name}/{index}"
            expected, logits = greedy(model, prompt, 6)
            got = torch.stack(recorder.rows[request_id]).cpu()
            if dtype == "float32":
                assert tokens_of(outputs[request_id]) == expected, request_id
            else:
                got, logits = got[:1], logits[:1]
            assert float((got - logits).abs().max() / logits.abs().max()) < LIMITS[dtype]


def test_adapters_that_take_turns_on_one_slot_of_the_gpu(tmp_path: Path) -> None:
    """Copies run on a stream of their own beside the steps; no token may see a half of one."""
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        name: save_adapter(
            base, lora("llama", r=4 + seed, target_modules="all-linear"), tmp_path / name, seed
        )
        for seed, name in enumerate("abc")
    }
    alone: dict[tuple[str, int], list[int]] = {}
    for slots in (3, 1):
        engine = build(
            folder,
            tmp_path / f"home{slots}",
            device="cuda",
            adapters=adapters,
            adapter_slots=slots,
            max_batch_tokens=24,
        )
        requests = [
            request(f"{name}/{index}", prompt, engine.adapters.resolve(name), max_tokens=40)
            for index, prompt in enumerate(PROMPTS)
            for name in adapters
        ]
        outputs = run(inner(engine), {0: requests[::2], 3: requests[1::2]})
        for name in adapters:
            for index in range(len(PROMPTS)):
                tokens = tokens_of(outputs[f"{name}/{index}"])
                assert tokens == alone.setdefault((name, index), tokens)
        engine.close()


def test_decode_steps_are_replayed_and_give_what_they_give_without_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        name: save_adapter(base, lora("llama", r=3 + 9 * seed), tmp_path / name, seed)
        for seed, name in enumerate("abcd")
    }

    def tokens(graphs: bool) -> dict[str, list[int]]:
        engine = build(
            folder, tmp_path / "home", quantization="nf4", device="cuda", adapters=adapters
        )
        core = inner(engine)
        own = core._runner.graphs
        assert own is not None, "the server did not choose the Triton backend"
        if not graphs:
            core._runner.graphs = None
        bring_in(engine)
        requests = [
            request(f"{name}/{index}", prompt, engine.adapters.resolve(name), max_tokens=20 + index)
            for index, prompt in enumerate(PROMPTS)
            for name in adapters
        ]
        outputs = run(core, {0: requests[::2], 3: requests[1::2]})
        assert not own.given_up
        assert bool(own.buckets) == graphs
        engine.close()
        return {name: tokens_of(output) for name, output in outputs.items()}

    assert tokens(graphs=True) == tokens(graphs=False)
