"""The logits of base and adapters as the server computes them now, to compare an export with."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from manylora_kernels import nf4_linear_in_float
from manylora_server.adapters.pins import EngineTasks
from manylora_server.adapters.receipt import ReceiptMeter
from manylora_server.export.export import ServedBase, WeightedFiles
from manylora_server.model.experts import NF4Experts
from manylora_store.compiler.canonical import CompiledAdapter
from manylora_store.compiler.compile import compile_adapter
from manylora_store.export.combining import Member, combine
from manylora_store.export.methods import Recipe


def served_base(meter: ReceiptMeter, engine: EngineTasks) -> ServedBase:
    """Return the base in memory as an export sees it.

    Its ``logits`` prepare in the calling thread, which must be limited to one torch thread; the
    pass itself is one task of the engine's thread, between two steps.
    """
    loaded = meter.loaded

    def logits(adapters: Sequence[WeightedFiles], recipe: Recipe) -> torch.Tensor:
        members = [
            Member(one.name, compile_adapter(one.files, loaded.layout), one.weight)
            for one in adapters
        ]
        patches = combine(members, recipe, loaded.layout).patches
        route = meter.route(CompiledAdapter(members[0].adapter.record, patches))

        def run() -> torch.Tensor:
            # As in a receipt: what eight bits round would hide what is looked for.
            with nf4_linear_in_float():
                return route.logits()

        return engine.run(run).result()

    dtype = str(loaded.dtype).removeprefix("torch.")
    held = "nf4 weights" if meter.view.quantized else "dense weights"
    return ServedBase(f"{held} in {dtype}, as served", _is_source(meter), logits)


def _is_source(meter: ReceiptMeter) -> bool:
    """Whether the weights in memory are the checkpoint's, and not rounded from them."""
    loaded = meter.loaded
    if loaded.dtype != torch.float32:
        return False
    if not meter.view.quantized:
        return True
    config = json.loads((loaded.folder / "config.json").read_text(encoding="utf-8"))
    # Experts are dense in every checkpoint, and quantized when they are loaded.
    experts = any(isinstance(module, NF4Experts) for module in loaded.model.modules())
    return "quantization_config" in config and not experts
