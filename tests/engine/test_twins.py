"""Twins on a real engine: made, compared, chosen and dropped while requests run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manylora_server.adapters.twins.job import MergeOrder
from manylora_server.adapters.twins.record import TwinRecord
from manylora_server.adapters.twins.step_times import PathChoice, StepTimes
from manylora_server.engine.async_engine import AsyncEngine
from support.adapters import lora, save_adapter
from support.models import save_model
from support.serving import build, inner, request, run, tokens_of


def make(tmp_path: Path, **options: Any) -> AsyncEngine:
    folder = tmp_path / "base"
    base = save_model("llama", folder)
    adapters = {
        "one": save_adapter(base, lora("llama"), tmp_path / "one", 1),
        "two": save_adapter(base, lora("llama", r=3), tmp_path / "two", 2),
    }
    return build(folder, tmp_path / "home", adapters=adapters, **options)


def merge(engine: AsyncEngine, name: str, precision: Any = "bf16", **more: Any) -> TwinRecord:
    core = inner(engine)
    future = core.twins.merge(MergeOrder(engine.adapters.resolve(name).digest, precision, **more))
    for _ in range(100_000):
        if future.done():
            return future.result()
        core.step()
        core.residency.host.wait(0.01 if core.stalled else 0)
    raise AssertionError("the merge does not end")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_merge(quantization: str, precision: str, tmp_path: Path) -> None:
    engine = make(tmp_path, quantization=quantization)
    record = merge(engine, "one", precision, force=True)
    print(record.as_dict())
