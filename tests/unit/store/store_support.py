"""PEFT adapters for the tiny models, and a plain evaluation of the algebra they compile to."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
)

from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler.canonical import (
    CompiledAdapter,
    ModulePatch,
)
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import AdapterError
from unit.store.tiny_models import VOCABULARY, layout_of


def save_adapter(
    base: PreTrainedModel,
    config: LoraConfig,
    folder: Path,
    rank_masks: Mapping[str, list[bool]] | None = None,
    **save_options: Any,
) -> Path:
    """Save a PEFT adapter in which every tensor that PEFT would train is random and signed.

    ``rank_masks`` plays the part of AdaLoRA's training: the ranks it kept, by module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                elif parameter.requires_grad or "lora_" in name:
                    parameter.copy_(0.4 * torch.randn_like(parameter))
        if rank_masks is not None:
            model.peft_config["default"].rank_pattern = {
                f"{name}.lora_E.default": mask for name, mask in rank_masks.items()
            }
        model.save_pretrained(folder, **save_options)
    return folder


def load_with_peft(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the base with PEFT's own layers for the adapter in ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return loaded.eval().base_model.model


def compile_folder(folder: Path, base: PreTrainedModel) -> CompiledAdapter:
    """Open and compile ``folder`` for ``base``."""
    return compile_adapter(open_folder(folder, "test", "file:test"), layout_of(base))


def evaluate(module: nn.Module, patch: ModulePatch, x: torch.Tensor) -> torch.Tensor:
    """The canonical equation, in the plainest form: the module's output with ``patch`` applied."""
    if patch.replacement is not None:
        assert set(patch.replacement) == {n for n, _ in module.named_parameters(recurse=False)}
        module = copy.deepcopy(module)
        for name, tensor in patch.replacement.items():
            assert tensor.shape == module.get_parameter(name).shape
            setattr(module, name, nn.Parameter(tensor))
    y = type(module).forward(module, x)
    if patch.low_rank is not None:
        low = patch.low_rank
        shrunk = low.a.T[x] if isinstance(module, nn.Embedding) else x @ low.a.T
        y = y + low.scaling * (shrunk @ low.b)
    if patch.output_scale is not None:
        y = y * patch.output_scale
    if patch.shift is not None:
        y = y + patch.shift
    return y


@torch.no_grad()
def assert_same_as_peft(base: PreTrainedModel, folder: Path) -> CompiledAdapter:
    """Compile ``folder`` and hold every module's output, and the logits, against PEFT's."""
    compiled = compile_folder(folder, base)
    reference = load_with_peft(base, folder)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in layout_of(base).modules:
        reference.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
    torch.manual_seed(2)
    tokens = torch.randint(0, VOCABULARY, (2, 9))
    expected = reference(tokens).logits
    assert set(compiled.patches) <= set(seen)
    for name, (x, output) in seen.items():
        patch = compiled.patches.get(name, ModulePatch())
        torch.testing.assert_close(
            evaluate(base.get_submodule(name), patch, x), output, rtol=1e-5, atol=1e-5
        )
    patched = copy.deepcopy(base)
    for name, patch in compiled.patches.items():
        module = patched.get_submodule(name)
        original = copy.deepcopy(module)
        module.forward = lambda x, original=original, patch=patch: evaluate(original, patch, x)
    torch.testing.assert_close(patched(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(tokens).logits, expected, rtol=1e-2, atol=1e-2)
    return compiled


def refuse(folder: Path, base: PreTrainedModel, error: type[AdapterError], *names: str) -> None:
    """Compiling must fail with exactly ``error``, and its message must hold each of ``names``."""
    with pytest.raises(AdapterError) as caught:
        compile_folder(folder, base)
    assert type(caught.value) is error, caught.value
    for name in names:
        assert name in caught.value.message


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of ``adapter_config.json``; ``...`` removes one."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        raw.pop(key, None)
        if value is not ...:
            raw[key] = value
    path.write_text(json.dumps(raw))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> dict[str, torch.Tensor]:
    """Rewrite the weight file after ``change`` has altered its tensors in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return tensors
