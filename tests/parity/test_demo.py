"""The demo that ships with the project gives PEFT's tokens, all of its adapters in one batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manylora_server.demo import BASE_DIR, DEMO_PROMPT, demo_adapters
from support.oracle import Oracle, greedy
from support.serving import Recorder, build, inner, request, run, tokens_of

NEW_TOKENS = 16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_demo_equals_peft(quantization: str, tmp_path: Path) -> None:
    adapters = demo_adapters()
    assert len(adapters) >= 4
    engine = build(BASE_DIR, tmp_path / "home", quantization=quantization, adapters=adapters)
    recorder = Recorder(inner(engine))
    prompt = engine.tokenizer.encode(DEMO_PROMPT)
    requests = [
        request(
            name or "base",
            prompt,
            None if name is None else engine.adapters.resolve(name),
            max_tokens=NEW_TOKENS,
        )
        for name in [None, *adapters]
    ]
    outputs = run(inner(engine), {0: requests[::2], 2: requests[1::2]})
    oracle = Oracle(BASE_DIR, quantization, adapters)
    for name in [None, *adapters]:
        expected, logits = greedy(oracle.model(name), prompt, NEW_TOKENS)
        got = torch.stack(recorder.rows[name or "base"])
        assert tokens_of(outputs[name or "base"]) == expected, name
        assert float((got - logits).abs().max() / logits.abs().max()) < 1e-4, name
