"""Receipts leave the base that is being served, and the process, as they were."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from manylora_kernels import native, select_backend
from manylora_server.model.attention import IMPLEMENTATION
from manylora_store.compiler.accounting import Ledger
from manylora_store.errors import AdapterInvalidError
from support.adapters import attention_targets, lora
from support.receipts import MeasuredBase, Served


def writing(architecture: str) -> dict[str, Any]:
    """Adapters whose files hold parameters of the base, which PEFT loads into it in place."""
    gpt2 = architecture == "gpt2"
    embedding = "wte" if gpt2 else "embed_tokens"
    targets = attention_targets(architecture)
    return {
        "biases": lora(architecture, bias="all"),
        "own-biases": lora(architecture, bias="lora_only"),
        "embeddings": lora(architecture, target_modules=[embedding, *targets]),
        "head": lora(architecture, target_modules=["lm_head", *targets]),
        "saved": lora(
            architecture, modules_to_save=[embedding, "lm_head", "ln_f" if gpt2 else "norm"]
        ),
        "dora": lora(architecture, use_dora=True),
    }


def shifted(base: MeasuredBase) -> None:
    """Give the original, from which adapters are saved, other weights than the served base."""
    with torch.no_grad():
        for name, parameter in base.original.named_parameters():
            if name.endswith("bias") or parameter.shape[0] == base.loaded.vocab_size:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def _half_layers() -> Iterator[None]:
    """Lets checkpoints of 16 bits stay what they are, where there are native kernels."""
    if native.missing is None:
        select_backend("half_linear", native.NATIVE)
    yield
    select_backend("half_linear", "reference")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.usefixtures("_half_layers")
def test_the_base_keeps_every_byte(
    architecture: str, quantization: str, stored: torch.dtype, tmp_path: Path
) -> None:
    base = MeasuredBase(architecture, tmp_path, quantization, stored=stored)
    served = Served(base, base.compile(base.adapter("served", lora(architecture, r=2), 9)))
    before = base.fingerprint()
    expected = served.logits()
    shifted(base)
    for seed, (name, config) in enumerate(writing(architecture).items()):
        receipt = base.measure(base.adapter(name, config, seed))
        assert receipt.largest_relative_logit_error < 1e-4, (name, receipt)
        assert base.fingerprint() == before, name
        assert torch.equal(served.logits(), expected), name
        assert base.loaded.model.config._attn_implementation == IMPLEMENTATION


def test_what_is_loaded_into_the_base_has_effect(tmp_path: Path) -> None:
    """Or the test above would show nothing: these files do change the base's own parameters."""
    base = MeasuredBase("qwen2", tmp_path)
    shifted(base)
    for name in ("biases", "embeddings", "head"):
        compiled = base.compile(base.adapter(name, writing("qwen2")[name]))
        changed = {
            module
            for module, patch in compiled.patches.items()
            if patch.replacement is not None or patch.shift is not None
        }
        assert changed >= (
            {"model.layers.0.self_attn.k_proj"}
            if name == "biases"
            else {"lm_head", "model.embed_tokens"}
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_peft_cannot_load_into_a_parameter_that_is_not_a_copy(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the ledger wrong, the adapter would be refused rather than the base overwritten."""
    base = MeasuredBase(architecture, tmp_path)
    shifted(base)
    kind = "biases" if architecture == "gpt2" else "embeddings"
    folder = base.adapter("a", writing(architecture)[kind])
    compiled = base.compile(folder)
    before = base.fingerprint()
    monkeypatch.setattr(
        "manylora_server.adapters.reference.prepare", lambda *_: (SimpleNamespace(), Ledger())
    )
    with pytest.raises(AdapterInvalidError, match="belongs to the base that is being served"):
        base.meter.prepare(folder, compiled)
    assert base.fingerprint() == before


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma3_text", "phi", "mixtral"])
def test_trees_share_tensors_and_nothing_else(
    architecture: str, quantization: str, tmp_path: Path
) -> None:
    base = MeasuredBase(architecture, tmp_path, quantization)
    model = base.loaded.model
    own = {id(module) for module in model.modules()}
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    trees = [base.view.tree(), base.view.tree()]
    trees.append(base.view.ordinary_tree(base.loaded.layout, base.loaded.dtype, {}))
    for tree in trees:
        modules = {id(module) for module in tree.modules()}
        assert not modules & own
        own |= modules
        assert tree.config is not model.config
        assert all(layer.config is tree.config for layer in tree.modules() if _reads(layer, tree))
    for parameter in trees[0].parameters():
        assert parameter.data_ptr() in memory
    # Stand-ins have biases of their own; no weight is copied.
    copies = [p for p in trees[2].parameters() if p.data_ptr() not in memory]
    assert all(parameter.dim() == 1 for parameter in copies)


def _reads(layer: nn.Module, tree: nn.Module) -> bool:
    """Whether the layer asks a configuration which attention to use."""
    return hasattr(layer, "layer_idx") and hasattr(layer, "config") and layer is not tree


def test_a_tree_is_not_wrapped_with_the_served_model(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    Served(base, base.compile(base.adapter("served", lora("llama"))))
    names = {type(module).__name__ for module in base.loaded.model.modules()}
    assert "AdaptedLinear" in names
    assert "AdaptedLinear" not in {type(module).__name__ for module in base.view.tree().modules()}


def test_filters_and_random_state_of_the_process_stay(tmp_path: Path) -> None:
    base = MeasuredBase("gpt2", tmp_path)
    folders = [
        # Each of them makes PEFT warn.
        base.adapter("a", lora("gpt2", fan_in_fan_out=False)),
        base.adapter("b", lora("gpt2", target_modules=["wte", "c_attn"])),
    ]
    filters, state = list(warnings.filters), torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(base.measure, folders * 4))
    assert warnings.filters == filters
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_measured_at_the_same_time_get_their_own_receipts(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path, "nf4")
    folders = [base.adapter(f"a{seed}", lora("llama", r=seed + 1), seed) for seed in range(6)]

    def measure(folder: Path) -> dict[str, Any]:
        told = base.measure(folder).as_dict()
        return {key: told[key] for key in told if key not in {"measured_at", "seconds"}}

    alone = [measure(folder) for folder in folders]
    assert len({told["effect"] for told in alone}) == len(folders)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(measure, folders * 2)) == alone * 2


def test_steps_may_run_in_another_thread_than_the_rest(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    measurement = base.meter.prepare(folder, base.compile(folder))
    assert len(measurement.steps) == 3, "the base's own logits are part of the first receipt"
    for step in measurement.steps:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert measurement.finish().relative_logit_error < 1e-4
    assert len(base.meter.prepare(folder, base.compile(folder)).steps) == 2


def test_memory_comes_back_without_a_collection(tmp_path: Path) -> None:
    """Both for a measurement that was finished and for one that was given up."""
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    compiled = base.compile(folder)

    def models_after(steps: int) -> list[weakref.ref[Any]]:
        measurement = base.meter.prepare(folder, compiled)
        models = [
            weakref.ref(route.model if hasattr(route, "model") else route.runner.model)
            for route in measurement._routes.values()
        ]
        for step in measurement.steps[:steps]:
            step()
        return models

    for steps in (0, 1, 3):
        models = models_after(steps)
        assert [model() for model in models] == [None] * len(models), steps


def test_a_refused_adapter_leaves_nothing(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    compiled = base.compile(folder)
    expected = base.measure(folder).effect
    before = base.fingerprint()
    with pytest.raises(AdapterInvalidError):
        base.measure(folder, replace(compiled, patches={}))
    assert base.fingerprint() == before
    assert base.measure(folder).effect == expected
