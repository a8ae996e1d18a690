"""Adapters saved in 32 and in 16 bits, side by side on the same modules, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_server.model.adapted import AdaptedLinear
from support.adapters import lora, save_adapter
from support.models import save_model
from support.oracle import Oracle, greedy
from support.serving import Recorder, bring_in, build, inner, request, run, tokens_of

WIDTHS = {"whole": torch.float32, "brain": torch.bfloat16, "half": torch.float16}
PROMPT = [5, 9, 40, 7, 77, 200, 31]


def cast(folder: Path, dtype: torch.dtype) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_mixed_widths_equal_peft(quantization: str, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapters = {
        name: cast(
            save_adapter(
                base, lora("llama", r=4, target_modules="all-linear"), tmp_path / name, seed
            ),
            dtype,
        )
        for seed, (name, dtype) in enumerate(WIDTHS.items())
    }
    engine = build(
        tmp_path / "base", tmp_path / "home", quantization=quantization, adapters=adapters
    )
    bring_in(engine)
    core = inner(engine)
    recorder = Recorder(core)
    requests = [
        request(name, PROMPT, engine.adapters.resolve(name), max_tokens=6) for name in adapters
    ]
    outputs = run(core, {0: [*requests, request("base", PROMPT, max_tokens=6)]})
    model = recorder._runner.model
    pools = {
        pool.a.dtype: len(pool.extents)
        for module in model.modules()
        if isinstance(module, AdaptedLinear)
        for pool in module.rank_pools
    }
    assert pools == dict.fromkeys(WIDTHS.values(), 1)
    oracle = Oracle(tmp_path / "base", quantization, adapters)
    for name in [None, *adapters]:
        expected, logits = greedy(oracle.model(name), PROMPT, 6)
        assert tokens_of(outputs[name or "base"]) == expected
        got = torch.stack(recorder.rows[name or "base"])
        assert float((got - logits).abs().max() / logits.abs().max()) < 1e-4
