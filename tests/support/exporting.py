"""Exports of tiny models, and what transformers makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from manylora_server.export.export import Export, WeightedFiles, run_export
from manylora_server.export.progress import Progress
from manylora_store.checkpoint.folder import open_folder
from manylora_store.export.methods import Recipe

IDS = torch.tensor([[5, 60, 7, 200, 31, 8, 9], [3, 100, 42, 42, 17, 250, 11]])


def export(
    base: Path,
    adapters: Mapping[Path, float],
    goal: Path,
    *,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    check: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Export to ``goal`` and return the report."""
    members = [
        WeightedFiles(folder.name, weight, open_folder(folder, folder.name, str(folder)))
        for folder, weight in adapters.items()
    ]
    recipe = Recipe(method, density, rank, seed)  # type: ignore[arg-type]
    wanted = Export(base.name, base, members, goal, recipe=recipe, check=check, **settings)
    return run_export(wanted, progress or Progress(lambda share, left: None), None)


def load(folder: Path) -> Any:
    """Load a checkpoint as anybody would, in float32; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    assert wrong == {}, wrong
    return model.eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of ``IDS``."""
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def with_peft(base: Path, adapter: Path) -> Any:
    """Return the base with an adapter on it, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()


def merged_by_peft(base: Path, adapter: Path) -> Any:
    """Return what PEFT's ``merge_and_unload`` makes of an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_peft(base, adapter).merge_and_unload().eval()


def assert_same(model: Any, expected: Any, atol: float = 1e-4) -> None:
    """Assert equal logits, within rounding of float32, and equal greedy tokens."""
    got, wanted = logits(model), logits(expected)
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-5)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=8, do_sample=False),
        expected.generate(IDS, max_new_tokens=8, do_sample=False),
    )


def assert_different(model: Any, other: Any) -> None:
    """Assert that two models do not compute the same, so that a comparison says something."""
    assert (logits(model) - logits(other)).abs().max() > 1e-2
