"""A loaded base with a receipt meter, without an engine."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manylora_kernels import NF4Weight
from manylora_server.adapters.receipt import Receipt, ReceiptMeter
from manylora_server.core.config import ModelConfig
from manylora_server.model.attention import KVCache
from manylora_server.model.base_view import BaseView
from manylora_server.model.batch import Chunk
from manylora_server.model.experts import NF4Experts
from manylora_server.model.half_linear import HalfModule
from manylora_server.model.loader import load_model
from manylora_server.model.modules import AdaptedModules
from manylora_server.model.nf4_linear import NF4Linear
from manylora_server.model.packed_linear import PackedLinear
from manylora_server.model.runner import ModelRunner
from manylora_server.model.self_test import run_self_test
from manylora_store.checkpoint.folder import open_folder
from manylora_store.compiler.canonical import CompiledAdapter
from manylora_store.compiler.compile import compile_adapter
from support.adapters import save_adapter
from support.models import save_model

PROMPT = [5, 60, 7, 200, 31, 8, 9]


class MeasuredBase:
    """A tiny base as a server has loaded it, its view taken before anything is wrapped."""

    def __init__(
        self,
        architecture: str,
        folder: Path,
        quantization: str = "none",
        dtype: str = "float32",
        stored: torch.dtype = torch.float32,
    ) -> None:
        self._folder = folder
        self.original = save_model(architecture, folder / "base", stored=stored)
        settings: dict[str, Any] = {"quantization": quantization, "device": "cpu", "dtype": dtype}
        self.loaded = load_model(ModelConfig(str(folder / "base"), "base", **settings))
        self.tested = run_self_test(
            self.loaded.model, self.loaded.vocab_size, self.loaded.dtype, self.loaded.device
        )
        self.modules = list(self.loaded.model.named_modules())
        self.view = BaseView(self.loaded.model)
        self.meter = ReceiptMeter(self.loaded, self.tested, self.view)

    def adapter(self, name: str, config: Any, seed: int = 0) -> Path:
        """Save a random adapter and return its folder."""
        # PEFT leaves what it saved whole in the model it is unloaded from.
        return save_adapter(copy.deepcopy(self.original), config, self._folder / name, seed)

    def compile(self, folder: Path) -> CompiledAdapter:
        return compile_adapter(open_folder(folder, folder.name, str(folder)), self.loaded.layout)

    def measure(self, folder: Path, compiled: CompiledAdapter | None = None) -> Receipt:
        """Measure ``compiled`` (by default what ``folder`` compiles to) against ``folder``."""
        measurement = self.meter.prepare(folder, compiled or self.compile(folder))
        for step in measurement.steps:
            step()
        return measurement.finish()

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of every tensor of the base, and its flags, by module and name."""
        return {
            f"{name}.{key}": hashlib.sha256(_bytes(tensor)).hexdigest()
            + f" {module.training} {tensor.requires_grad}"
            for name, module in self.modules
            for key, tensor in _tensors(module)
        }


class Served:
    """The base's own modules with one adapter in a slot, as the engine runs them."""

    def __init__(self, base: MeasuredBase, adapter: CompiledAdapter) -> None:
        loaded = base.loaded
        modules = AdaptedModules(
            loaded.model, loaded.layout, base.tested.token_axes, loaded.dtype, loaded.device
        )
        modules.install(0, adapter)
        cache = KVCache(base.tested.shapes, 3, len(PROMPT), loaded.dtype, loaded.device)
        self._runner = ModelRunner(loaded.model, cache, loaded.dtype, loaded.device)

    def logits(self) -> torch.Tensor:
        """Return logits with the adapter and without, out of one batch."""
        chunks = [
            Chunk(PROMPT, 0, [1 + row], adapters, True)
            for row, adapters in enumerate((((0, 1.0),), ()))
        ]
        return self._runner.logits(chunks)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    if isinstance(module, PackedLinear | HalfModule):
        yield "packed", module.dense_weight()
    if isinstance(module, NF4Linear):
        yield from _packed("weight", module.weight_nf4)
    if isinstance(module, NF4Experts):
        for index, weight in enumerate([*module.gate_up, *module.down]):
            yield from _packed(f"expert{index}", weight)


def _packed(name: str, weight: NF4Weight) -> Iterator[tuple[str, torch.Tensor]]:
    for field in ("packed", "code", "absmax", "absmax_code", "absmax_scale"):
        tensor = getattr(weight, field)
        if tensor is not None:
            yield f"{name}.{field}", tensor


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
