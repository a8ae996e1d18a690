"""What the compiler sees of the base, whatever the engine is doing with it at that moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from manylora_server.core.config import ModelConfig
from manylora_server.model.loader import load_model
from support.models import save_model


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm"])
def test_a_module_whose_parameters_are_swapped_still_shows_the_base_s(
    name: str, tmp_path: Path
) -> None:
    """A step swaps them for an adapter's while a loader compiles in another thread."""
    save_model("llama", tmp_path)
    loaded = load_model(ModelConfig(str(tmp_path), "base", quantization="none", device="cpu"))
    module = loaded.model.get_submodule(name)
    own = module.weight.detach().clone()
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(
        lambda *_: seen.append(loaded.layout.weight(name, "weight").clone())
    )
    inputs = torch.tensor([[1, 2]]) if name.endswith("tokens") else torch.ones(1, 2, 64)
    functional_call(module, {"weight": torch.zeros_like(own)}, (inputs,))
    assert len(seen) == 1
    assert torch.equal(seen[0], own)
