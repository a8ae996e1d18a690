"""A combination of adapters as one LoRA folder that PEFT loads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from manylora_store.checkpoint.config_reader import CONFIG_NAME
from manylora_store.checkpoint.names import PREFIX
from manylora_store.checkpoint.weights import SAFETENSORS_NAME
from manylora_store.compiler.canonical import BaseLayout, LowRank, ModulePatch
from manylora_store.errors import AdapterUnsupportedError, CombinationError
from manylora_store.export.combining import more_than_low_rank
from manylora_store.export.tensor_files import TensorFileWriter, TensorForm
from manylora_store.storage_failures import storage_errors


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """``adapter_config.json`` and the tensors of ``adapter_model.safetensors``."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def bytes(self) -> int:
        """The tensors' size."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def lora_content(
    patches: Mapping[str, ModulePatch],
    layout: BaseLayout,
    base_model: str | None,
    dtype: torch.dtype = torch.float32,
) -> AdapterContent:
    """Write ``patches`` as one LoRA: each scaling is folded into ``A``, so that ``alpha = r``.

    Raises:
        AdapterUnsupportedError: a patch is more than a low-rank product.
        CombinationError: there is none.
    """
    products: dict[str, LowRank] = {}
    for name, patch in patches.items():
        reason = more_than_low_rank(name, patch)
        if reason is not None:
            raise AdapterUnsupportedError(
                f"adapters: this cannot be written as one LoRA adapter: {reason}"
            )
        if patch.low_rank is not None:
            products[name] = patch.low_rank
    if not products:
        raise CombinationError("adapters: together they have no low-rank part to write", "adapters")
    tensors: dict[str, torch.Tensor] = {}
    for name, low in products.items():
        tensors |= _tensors(name, low, layout, dtype)
    return AdapterContent(_config(products, layout, base_model), tensors)


def write_lora(content: AdapterContent, folder: Path) -> None:
    """Write both files into ``folder``, which is there.

    Raises:
        StoreFullError, StoreUnavailableError: they cannot be written.
    """
    with storage_errors(folder):
        text = json.dumps(content.config, indent=2, sort_keys=True)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        forms = {name: TensorForm(t.dtype, tuple(t.shape)) for name, t in content.tensors.items()}
        with TensorFileWriter(folder / SAFETENSORS_NAME, forms) as file:
            for name, tensor in content.tensors.items():
                file.write(name, tensor)


def _tensors(
    name: str, low: LowRank, layout: BaseLayout, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    spec = layout.modules[name]
    a = (low.a.float() * (low.scaling / spec.output_multiplier)).to(dtype).contiguous()
    b = low.b.float().T.to(dtype).contiguous()
    slots = ("embedding_A", "embedding_B") if spec.kind == "embedding" else ("A.weight", "B.weight")
    return {f"{PREFIX}{name}.lora_{slot}": t for slot, t in zip(slots, (a, b), strict=True)}


def _config(
    products: Mapping[str, LowRank], layout: BaseLayout, base_model: str | None
) -> dict[str, Any]:
    rank = Counter(low.rank for low in products.values()).most_common(1)[0][0]
    others = {name: low.rank for name, low in products.items() if low.rank != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_target_names(products, layout),
        fan_in_fan_out=any(layout.modules[name].transposed for name in products),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).to_dict()
    # As PEFT's own ``save_pretrained``: sets are lists in JSON.
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }


def _target_names(products: Mapping[str, LowRank], layout: BaseLayout) -> list[str]:
    """Return last parts of names where these mean the same modules, else whole names."""
    endings = {name.rpartition(".")[2] for name in products}
    meant = {
        name
        for name in layout.modules
        if any(name == ending or name.endswith(f".{ending}") for ending in endings)
    }
    return sorted(endings) if meant == set(products) else sorted(products)
