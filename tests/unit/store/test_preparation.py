"""Plan and ledger are worked out once for adapters alike, and never for adapters that are not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler import preparation
from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import AdapterIncompatibleError, AdapterInvalidError
from unit.store.store_support import edit_config, edit_tensors, save_adapter
from unit.store.tiny_models import build_base, layout_of

BASE = build_base("llama")
LAYOUT = layout_of(BASE)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time a plan is worked out; the memory is empty before."""
    preparation._entries.clear()
    calls = []
    plan_targets = preparation.plan_targets

    def counted(config: Any, layout: BaseLayout) -> Any:
        calls.append(config.peft_type)
        return plan_targets(config, layout)

    monkeypatch.setattr(preparation, "plan_targets", counted)
    return calls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return save_adapter(BASE, config, tmp_path)


def compiled(folder: Path, layout: BaseLayout = LAYOUT, name: str = "a") -> CompiledAdapter:
    return compile_adapter(open_folder(folder, name, "file:x"), layout)


def test_adapters_alike_share_the_work_and_nothing_else(folder: Path, planned: list[str]) -> None:
    first = compiled(folder)
    edit_config(folder, base_model_name_or_path="another/base", inference_mode=None)
    edit_tensors(folder, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    edit_tensors(folder, lambda tensors: tensors[f"base_model.model.{Q}.lora_A.weight"].mul_(3))
    again = compiled(folder)
    edit_tensors(folder, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    third = compiled(folder, name="b")
    assert len(planned) <= 2, "safetensors' own writer gives the first file another header"
    assert (third.record.name, again.record.name) == ("b", "a")
    assert again.record.base_model == "another/base"
    assert len({first.record.digest, again.record.digest, third.record.digest}) == 3
    low = [adapter.patches[Q].low_rank for adapter in (first, again, third)]
    assert low[0] is not None
    assert low[1] is not None
    assert low[2] is not None
    torch.testing.assert_close(low[1].a, -3 * low[0].a)
    torch.testing.assert_close(low[2].a, 3 * low[0].a)


def test_a_result_from_memory_is_the_result(folder: Path, planned: list[str]) -> None:
    first, second = compiled(folder), compiled(folder)
    assert len(planned) == 1
    assert first.record.ranks == second.record.ranks
    assert first.record.warnings == second.record.warnings
    assert list(first.patches) == list(second.patches)
    for name, patch in first.patches.items():
        other = second.patches[name]
        assert patch.low_rank is not None
        assert other.low_rank is not None
        assert patch.low_rank.scaling == other.low_rank.scaling
        assert patch.low_rank.a.equal(other.low_rank.a)
        assert patch.low_rank.b.equal(other.low_rank.b)


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 2}}, 1.0),
        ({"alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 4}}, 0.5),
    ],
)
def test_another_configuration_is_another_plan(
    changes: dict[str, Any], scaling: float, folder: Path, planned: list[str]
) -> None:
    compiled(folder)
    edit_config(folder, alpha_pattern={"self_attn.q_proj": 40, "q_proj": 20})
    compiled(folder)
    edit_config(folder, alpha_pattern={})
    edit_config(folder, **changes)
    low = compiled(folder).patches[Q].low_rank
    assert low is not None
    assert low.scaling == scaling
    assert len(planned) == 3


def test_the_order_of_patterns_is_part_of_the_configuration(
    folder: Path, planned: list[str]
) -> None:
    scalings = []
    for pattern in ({"self_attn.q_proj": 4, "q_proj": 2}, {"q_proj": 2, "self_attn.q_proj": 4}):
        edit_config(folder, alpha_pattern=pattern)
        low = compiled(folder).patches[Q].low_rank
        assert low is not None
        scalings.append(low.scaling)
    assert scalings == [1.0, 0.5]
    assert len(planned) == 2


def test_another_base_is_another_plan(folder: Path, planned: list[str]) -> None:
    compiled(folder)
    compiled(folder, layout_of(BASE))
    assert len(planned) == 2
    fewer = {name: spec for name, spec in LAYOUT.modules.items() if "layers.1" not in name}
    with pytest.raises(AdapterIncompatibleError):
        compiled(folder, BaseLayout("llama", fewer, LAYOUT.weight))


def test_other_tensors_are_looked_at_again(folder: Path, planned: list[str]) -> None:
    compiled(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(f"base_model.model.{Q}.lora_A.weight"))
    for _ in range(2):
        with pytest.raises(AdapterInvalidError, match=r"lacks tensor.*lora_A"):
            compiled(folder)
    assert len(planned) == 3


def test_only_so_many_plans_are_kept(
    folder: Path, planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MAX_REMEMBERED", 2)
    for alpha in (1, 2, 1, 3, 1, 2):
        edit_config(folder, lora_alpha=alpha)
        compiled(folder)
        assert len(preparation._entries) <= 2
    assert len(planned) == 4, "alpha 1 stays, as it is used again and again; alpha 2 has to go"


def test_adapters_of_very_many_tensors_are_not_kept(
    folder: Path, planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MAX_TENSORS", 7)
    compiled(folder)
    compiled(folder)
    assert len(planned) == 2
    assert not preparation._entries


def test_threads_may_compile_at_the_same_time(
    tmp_path: Path, planned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MAX_REMEMBERED", 2)
    folders = []
    for alpha in range(1, 5):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
        folders.append(save_adapter(BASE, config, tmp_path / str(alpha)))
    wrong: list[object] = []

    def work(first: int) -> None:
        for step in range(12):
            index = (first + step) % 4
            low = compiled(folders[index]).patches[Q].low_rank
            if low is None or low.scaling != (index + 1) / 2:
                wrong.append(low)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(planned) >= 4
