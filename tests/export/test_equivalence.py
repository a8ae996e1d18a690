"""The comparison of a result with base and adapters unmerged: what it runs, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from manylora_server.adapters.canary import POSITIONS, canary_prompts
from manylora_server.export import check_process, equivalence
from manylora_server.export.check_process import NoMemoryError, Task
from manylora_server.export.equivalence import Comparison, differences, doubts
from manylora_server.export.progress import Progress
from support.adapters import lora, save_adapter
from support.exporting import export, load
from support.models import VOCAB, save_model


def task(folder: Path, base: Path | None = None) -> Task:
    return Task(
        exported=str(folder),
        prompts=canary_prompts(VOCAB),
        positions=POSITIONS,
        result="",
        polite=False,
        parent=0,
        base=None if base is None else str(base),
        config="",
        weights="",
        digest="",
    )


@torch.inference_mode()
def directly(folder: Path) -> torch.Tensor:
    ids = torch.tensor(canary_prompts(VOCAB))
    result: torch.Tensor = load(folder)(input_ids=ids).logits[:, list(POSITIONS)].flatten(0, 1)
    return result


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_where_memory_is_short_a_checkpoint_is_run_layer_by_layer(
    architecture: str,
    stored: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(architecture, tmp_path / "base", stored=stored)
    whole = check_process.exported_logits(task(tmp_path / "base"))
    monkeypatch.setattr(check_process, "_SHARE", 0)
    streamed = check_process.exported_logits(task(tmp_path / "base"))
    torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, directly(tmp_path / "base"), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_run_layer_by_layer_is_not_run_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "a", 1)
    export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out", dtype="nf4")
    monkeypatch.setattr(check_process, "_SHARE", 0)
    with pytest.raises(NoMemoryError, match="in 4 bits"):
        check_process.exported_logits(task(tmp_path / "out"))
    with pytest.raises(NoMemoryError, match="load the base"):
        check_process.fused_logits(task(tmp_path / "out", tmp_path / "base"))


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_rounding_shows_and_no_more(dtype: str, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapters = {
        save_adapter(base, lora("llama", r=rank), tmp_path / f"r{rank}", rank): 0.5
        for rank in (2, 3)
    }
    report = export(tmp_path / "base", adapters, tmp_path / "out", dtype=dtype, check=True)
    same = report["equivalence"]["same_base"]
    low, high = {"bf16": (1e-4, 6e-2), "nf4": (6e-3, 1.0)}[dtype]
    assert low < same["median_relative_error"] < high
    assert 0 < same["mean_kl"] <= same["max_kl"]
    assert report["warnings"] == []


def stubbed(
    monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], missing: dict[str, str]
) -> Comparison:
    """Compare logits as if a process had found them."""

    def run(wanted: Any, scratch: Path, progress: Progress) -> None:
        save_file(tensors, wanted.result, {"missing": json.dumps(missing)})

    monkeypatch.setattr(equivalence, "_run", run)
    progress = Progress(lambda share, left: None)
    return Comparison(Path("x"), VOCAB, progress, base=None, adapter=None, polite=False)


def test_what_was_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(24, VOCAB)
    found = stubbed(monkeypatch, {"exported": logits}, {"fused": "too little memory"})
    assert found.with_base("dense") == {"skipped": "too little memory"}
    assert found.with_logits("served", logits)["max_abs_error"] == 0
    found = stubbed(monkeypatch, {"exported": torch.zeros(0)}, {"exported": "no"})
    assert found.with_base("dense") == found.with_logits("served", logits) == {"skipped": "no"}


def test_differences_are_what_they_say() -> None:
    expected = torch.tensor([[0.0, 1.0, 3.0], [2.0, 1.0, 0.0]])
    got = torch.tensor([[0.0, 1.0, 2.7], [1.0, 1.2, 0.0]])
    found = differences(expected, got)
    assert found["max_abs_error"] == pytest.approx(1.0)
    assert found["max_relative_error"] == pytest.approx(0.5)
    assert found["median_relative_error"] == pytest.approx(0.1)
    assert found["top1_agreement"] == 0.5
    p, q = expected.double().softmax(1), got.double().softmax(1)
    kl = (p * (p / q).log()).sum(1)
    assert found["max_kl"] == pytest.approx(float(kl.max()))
    assert found["mean_kl"] == pytest.approx(float(kl.mean()))


def test_a_doubtful_result_is_told() -> None:
    assert doubts({"median_relative_error": 2e-3}, "fp32")
    assert not doubts({"median_relative_error": 2e-3}, "bf16")
    assert not doubts({"median_relative_error": 0.5}, "nf4")
    assert not doubts({"skipped": "no memory"}, "fp32")
