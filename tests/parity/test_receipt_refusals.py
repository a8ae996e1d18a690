"""Adapters that the server would serve wrongly, or that PEFT does not take, get no receipt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora_store.compiler.canonical import CompiledAdapter, LowRank, ModulePatch
from manylora_store.errors import AdapterInvalidError
from support.adapters import adalora, lora
from support.receipts import MeasuredBase

Q_PROJ = "model.layers.0.self_attn.q_proj"


def changed(
    adapter: CompiledAdapter, change: Callable[[str, ModulePatch], ModulePatch | None]
) -> CompiledAdapter:
    patches = {name: change(name, patch) for name, patch in adapter.patches.items()}
    return replace(adapter, patches={n: p for n, p in patches.items() if p is not None})


def with_factors(patch: ModulePatch, change: Callable[[LowRank], LowRank]) -> ModulePatch:
    assert patch.low_rank is not None
    return replace(patch, low_rank=change(patch.low_rank))


def scaled(_: str, patch: ModulePatch) -> ModulePatch:
    return with_factors(patch, lambda low: replace(low, scaling=low.scaling * 1.2))


def one_sign_flipped(name: str, patch: ModulePatch) -> ModulePatch:
    if name != Q_PROJ:
        return patch
    return with_factors(patch, lambda low: replace(low, a=-low.a))


def one_module_missing(name: str, patch: ModulePatch) -> ModulePatch | None:
    return None if name == Q_PROJ else patch


def ranks_permuted(_: str, patch: ModulePatch) -> ModulePatch:
    return with_factors(patch, lambda low: replace(low, a=low.a.flip(0)))


def without_output_scale(_: str, patch: ModulePatch) -> ModulePatch:
    return replace(patch, output_scale=None)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "corruption",
    [scaled, one_sign_flipped, one_module_missing, ranks_permuted, without_output_scale],
)
def test_what_is_not_what_peft_computes_is_refused(
    corruption: Callable[[str, ModulePatch], ModulePatch | None],
    quantization: str,
    tmp_path: Path,
) -> None:
    base = MeasuredBase("llama", tmp_path, quantization)
    folder = base.adapter("a", lora("llama", use_dora=corruption is without_output_scale))
    compiled = base.compile(folder)
    base.measure(folder, compiled)
    with pytest.raises(AdapterInvalidError, match="differ from PEFT's by"):
        base.measure(folder, changed(compiled, corruption))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_sixteen_bits_too(dtype: str, tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path, "none", dtype)
    folder = base.adapter("a", lora("llama"))
    with pytest.raises(AdapterInvalidError, match="differ from PEFT's by"):
        base.measure(folder, changed(base.compile(folder), one_sign_flipped))


def test_an_adapter_that_does_little_must_do_that_little(tmp_path: Path) -> None:
    """Its whole effect is below what other adapters may be wrong by."""
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    path = folder / "adapter_model.safetensors"
    weak = {n: t * (2e-4 if "lora_B" in n else 1) for n, t in load_file(path).items()}
    save_file(weak, path)
    compiled = base.compile(folder)
    receipt = base.measure(folder, compiled)
    assert 1e-4 < receipt.effect < 1e-3
    with pytest.raises(AdapterInvalidError, match="at most 1"):
        base.measure(folder, replace(compiled, patches={}))


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e25 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterInvalidError, match="of the server's logits are not finite"):
        base.measure(folder)


def test_values_beyond_the_base_s_dtype_are_refused(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path, "none", "float16")
    folder = base.adapter("a", lora("llama"))
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterInvalidError, match=r"float16"):
        base.measure(folder)


def test_what_peft_itself_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    """PEFT's AdaLoRA wants a field that has no bearing on what is computed."""
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", adalora("llama"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "total_step": None}))
    with pytest.raises(AdapterInvalidError, match="PEFT cannot load the adapter") as caught:
        base.measure(folder)
    assert isinstance(caught.value.__cause__, ValueError)
    assert str(caught.value.__cause__) in caught.value.message


def test_what_peft_cannot_run_is_refused_with_its_reason(tmp_path: Path) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))
    measurement = base.meter.prepare(folder, base.compile(folder))

    def fail(*_: object) -> None:
        raise ValueError("wrong shapes")

    measurement._routes["peft"].model.register_forward_pre_hook(fail)
    *others, last = measurement.steps
    for step in others:
        step()
    with pytest.raises(AdapterInvalidError, match=r"PEFT cannot run .*: wrong shapes"):
        last()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_want_of_memory_is_no_fault_of_the_adapter(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = MeasuredBase("llama", tmp_path)
    folder = base.adapter("a", lora("llama"))

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("manylora_server.adapters.reference.PeftModel.from_pretrained", full)
    with pytest.raises(error):
        base.meter.prepare(folder, base.compile(folder))
