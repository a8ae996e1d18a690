"""Combinations of adapters against PEFT's ``add_weighted_adapter`` and ``merge_and_unload``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from manylora_server.core.errors import AdapterRefusedError, InvalidRequestError
from manylora_server.export.base import open_base
from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler.compile import compile_adapter
from manylora_store.errors import CombinationError
from manylora_store.export.adapter_folder import lora_content, write_lora
from manylora_store.export.combining import Member, combine
from manylora_store.export.methods import METHODS, Recipe
from support.adapters import adalora, lora, save_adapter, train_biases
from support.exporting import (
    assert_different,
    assert_same,
    export,
    load,
    with_peft,
)
from support.models import save_model

TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "wte"],
    "gemma3_text": ["q_proj", "v_proj"],
}


def combined_by_peft(
    base: Path, adapters: dict[Path, float], method: str, **settings: Any
) -> PeftModel:
    """Return the base with the one adapter that PEFT makes of several, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        first, *others = adapters
        peft = PeftModel.from_pretrained(model, first, adapter_name=first.name)
        for other in others:
            peft.load_adapter(other, adapter_name=other.name)
        # Making the new adapter draws random numbers, too; the method's own come after.
        seed, inject = settings.pop("seed", 0), peft.base_model.inject_adapter
        peft.base_model.inject_adapter = lambda *args: (inject(*args), torch.manual_seed(seed))
        peft.add_weighted_adapter(
            [path.name for path in adapters],
            list(adapters.values()),
            "combined",
            combination_type=method,
            **settings,
        )
        peft.set_adapter("combined")
        return peft.eval()


@pytest.fixture(params=sorted(TARGETS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[Path, float]]:
    """A base with three adapters of one rank, of which one leaves a module alone."""
    architecture = request.param
    base = save_model(architecture, tmp_path / "base")
    targets = TARGETS[architecture]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tmp_path / "base", {
            save_adapter(
                base,
                lora(architecture, target_modules=own, lora_alpha=alpha),
                tmp_path / name,
                seed,
            ): weight
            for seed, (name, own, alpha, weight) in enumerate(
                [("a", targets, 8, 0.7), ("b", targets, 3, -0.4), ("c", targets[:1], 5, 1.3)]
            )
        }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_peft_s(
    method: str, family: tuple[Path, dict[Path, float]], tmp_path: Path
) -> None:
    base, adapters = family
    settings: dict[str, Any] = {}
    if method in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        settings["density"] = 0.6
    expected = combined_by_peft(
        base,
        adapters,
        method,
        seed=11,
        **settings,
        **({"svd_rank": 4} if method == "svd" else {}),
    )
    report = export(
        base,
        adapters,
        tmp_path / "out",
        method=method,
        seed=11,
        rank=4 if method == "svd" else None,
        **settings,
    )
    merged = load(tmp_path / "out")
    # PEFT's SVD is of the dense product, in float32.
    assert_same(merged, expected, atol=1e-3 if method == "svd" else 1e-4)
    assert_different(merged, load(base))
    assert (report["svd_relative_error"] is not None) == (method == "svd")


@pytest.mark.parametrize("seed", [0, 1])
def test_random_methods_follow_their_seed(seed: int, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    paths = {save_adapter(base, lora("llama"), tmp_path / f"{i}", i): 0.5 for i in range(2)}
    for name in ("one", "two"):
        export(tmp_path / "base", paths, tmp_path / name, method="dare_ties", seed=seed)
    export(tmp_path / "base", paths, tmp_path / "other", method="dare_ties", seed=seed + 5)
    assert_same(load(tmp_path / "one"), load(tmp_path / "two"))
    assert_different(load(tmp_path / "one"), load(tmp_path / "other"))


def test_one_adapter_is_taken_exactly_by_every_method(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "a", 1)
    for method in ("cat", "ties", "svd", "magnitude_prune"):
        export(tmp_path / "base", {adapter: 1.0}, tmp_path / method, method=method)
        assert_same(load(tmp_path / method), with_peft(tmp_path / "base", adapter))


class TestAdapterFolder:
    """The combination as one adapter folder, loaded by PEFT."""

    def test_cat_is_the_exact_sum_at_any_ranks(self, tmp_path: Path) -> None:
        base = save_model("llama", tmp_path / "base")
        adapters = {
            save_adapter(base, lora("llama", r=3), tmp_path / "a", 1): 0.7,
            save_adapter(
                base,
                lora("llama", r=5, use_rslora=True, target_modules=["q_proj", "up_proj"]),
                tmp_path / "b",
                2,
            ): -0.3,
            save_adapter(base, adalora("llama"), tmp_path / "c", 3): 0.5,
        }
        report = export(tmp_path / "base", adapters, tmp_path / "one", adapter_only=True)
        export(tmp_path / "base", adapters, tmp_path / "merged")
        assert_same(with_peft(tmp_path / "base", tmp_path / "one"), load(tmp_path / "merged"))
        assert report["kind"] == "adapter"
        # The store takes it as any other.
        files = open_folder(tmp_path / "one", "one", "")
        compiled = compile_adapter(files, open_base(tmp_path / "base").layout)
        ranks = set(compiled.record.ranks.values())
        assert ranks == {3 + 5 + 6, 3 + 6, 5}
        assert all(patch.low_rank.scaling == 1 for patch in compiled.patches.values())

    @pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "llama"])
    def test_embeddings_and_conv1d(self, architecture: str, tmp_path: Path) -> None:
        base = save_model(architecture, tmp_path / "base")
        targets = {"gpt2": ["c_attn", "wte"]}.get(architecture, ["q_proj", "embed_tokens"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapters = {
                save_adapter(
                    base, lora(architecture, target_modules=targets, r=2 + i), tmp_path / f"{i}", i
                ): 0.6
                for i in range(2)
            }
        export(tmp_path / "base", adapters, tmp_path / "one", adapter_only=True)
        export(tmp_path / "base", adapters, tmp_path / "merged")
        assert_same(with_peft(tmp_path / "base", tmp_path / "one"), load(tmp_path / "merged"))

    def test_svd_says_what_it_left_out(self, tmp_path: Path) -> None:
        base = save_model("llama", tmp_path / "base")
        adapters = {save_adapter(base, lora("llama"), tmp_path / f"{i}", i): 1.0 for i in range(2)}
        errors = []
        for rank in (2, 5, 8):
            report = export(
                tmp_path / "base",
                adapters,
                tmp_path / f"svd{rank}",
                method="svd",
                rank=rank,
                adapter_only=True,
            )
            assert report["rank"] == rank
            errors.append(report["svd_relative_error"])
        assert errors[0] > errors[1] > 1e-2
        assert errors[2] < 1e-6
        layout = open_base(tmp_path / "base").layout
        products = [
            {
                name: low.scaling * (low.b.T @ low.a)
                for name, patch in compile_adapter(
                    open_folder(path, "x", ""), layout
                ).patches.items()
                if (low := patch.low_rank) is not None
            }
            for path in (*adapters, tmp_path / "svd2")
        ]
        dropped = whole = 0.0
        for name in products[0]:
            exact = products[0][name] + products[1][name]
            dropped += float((exact - products[2][name]).square().sum())
            whole += float(exact.square().sum())
        assert (dropped / whole) ** 0.5 == pytest.approx(errors[0], rel=1e-4)

    def test_an_adapter_that_is_more_than_a_product_is_refused(self, tmp_path: Path) -> None:
        base = save_model("llama", tmp_path / "base")
        adapter = save_adapter(base, lora("llama", use_dora=True), tmp_path / "dora", 1)
        with pytest.raises(AdapterRefusedError, match="DoRA magnitude"):
            export(tmp_path / "base", {adapter: 1.0}, tmp_path / "one", adapter_only=True)
        assert not (tmp_path / "one").exists()

    def test_what_is_not_there_cannot_be_written(self, tmp_path: Path) -> None:
        save_model("llama", tmp_path / "base")
        with pytest.raises(CombinationError, match="no low-rank part"):
            lora_content({}, open_base(tmp_path / "base").layout, None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora("qwen2", use_dora=True), "DoRA magnitude"),
        (lora("qwen2", modules_to_save=["norm"]), "modules_to_save"),
        (lora("qwen2", bias="all"), "a bias"),
    ],
)
def test_who_does_more_than_a_product_comes_alone(config: Any, reason: str, tmp_path: Path) -> None:
    base = save_model("qwen2", tmp_path / "base")
    special = save_adapter(base, config, tmp_path / "special", 1)
    train_biases(special)
    plain = save_adapter(base, lora("qwen2"), tmp_path / "plain", 2)
    for adapters in ({plain: 1.0, special: 1.0}, {special: 0.5}):
        with pytest.raises(AdapterRefusedError, match=reason) as caught:
            export(tmp_path / "base", adapters, tmp_path / "out")
        assert "'special' can only be taken alone and with weight 1" in caught.value.message
        assert caught.value.code == "adapter_unsupported"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
)
def test_unequal_ranks_need_cat_or_svd(method: str, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapters = {
        save_adapter(base, lora("llama", r=rank), tmp_path / f"r{rank}", rank): 1.0
        for rank in (2, 4)
    }
    with pytest.raises(InvalidRequestError, match="r2 has 2, r4 has 4; method cat takes any ranks"):
        export(tmp_path / "base", adapters, tmp_path / "out", method=method)


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"method": "slerp"}, "method", "'slerp' came; it is one of linear, cat, svd"),
        ({"density": 0.0}, "density", "over 0 and up to 1"),
        ({"density": 1.5}, "density", "over 0 and up to 1"),
        ({"density": float("nan")}, "density", "over 0 and up to 1"),
        ({"rank": 0}, "rank", "from 1 to"),
    ],
)
def test_settings_out_of_range_are_named(
    settings: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(CombinationError, match=message) as caught:
        Recipe(**settings)
    assert caught.value.param == param


def test_weights_must_be_finite(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "a", 1)
    with pytest.raises(InvalidRequestError, match="weight of 'a' is inf"):
        export(tmp_path / "base", {adapter: float("inf")}, tmp_path / "out")
    with pytest.raises(InvalidRequestError, match="none came"):
        export(tmp_path / "base", {}, tmp_path / "out")


def test_a_setting_that_means_nothing_is_told(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    adapter = save_adapter(base, lora("llama"), tmp_path / "a", 1)
    report = export(tmp_path / "base", {adapter: 1.0}, tmp_path / "out", density=0.5, rank=2)
    assert len(report["warnings"]) == 2
    assert report["density"] is report["rank"] is None


def test_the_order_of_modules_is_the_model_s(tmp_path: Path) -> None:
    """Random draws are the same as PEFT's only in that order."""
    base = save_model("llama", tmp_path / "base")
    layout = open_base(tmp_path / "base").layout
    folder = save_adapter(base, lora("llama"), tmp_path / "a", 1)
    member = Member("a", compile_adapter(open_folder(folder, "a", ""), layout), 0.5)
    patches = combine([member, member], Recipe("cat"), layout).patches
    order = list(layout.modules)
    assert list(patches) == sorted(patches, key=order.index)
    target = tmp_path / "written"
    target.mkdir()
    write_lora(lora_content(patches, layout, "base"), target)
    assert open_folder(target, "x", "").config.base_model == "base"
