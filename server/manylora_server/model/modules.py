"""The base's modules that adapters change, wrapped on first use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from manylora_server.model.adapted import (
    AdaptedEmbedding,
    AdaptedLinear,
    AdaptedModule,
    AdaptedNorm,
)
from manylora_server.model.installation import Installation
from manylora_store.compiler.canonical import BaseLayout, CompiledAdapter, ModuleKind

_WRAPPERS: dict[ModuleKind, type[AdaptedModule]] = {
    "linear": AdaptedLinear,
    "embedding": AdaptedEmbedding,
    "norm": AdaptedNorm,
}


class AdaptedModules:
    """Installs compiled adapters into slots of the model's modules, between steps.

    ``token_axes`` says for each norm which axis counts tokens, as the self-test saw it.
    """

    KINDS = frozenset(_WRAPPERS)

    def __init__(
        self,
        model: nn.Module,
        layout: BaseLayout,
        token_axes: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model = model
        self._layout = layout
        self._token_axes = token_axes
        self._dtype = dtype
        self._device = device
        self._wrapped: dict[str, AdaptedModule] = {}
        # Counts up whenever a module's patches may have changed.
        self.version = 0
        self.copy_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def wrapped(self) -> Collection[AdaptedModule]:
        """The modules that an adapter has touched."""
        return self._wrapped.values()

    def install(self, slot: int, adapter: CompiledAdapter) -> None:
        """Install every patch of ``adapter`` under ``slot`` at once, or none if one fails."""
        Installation(self, slot, adapter).finish()

    def remove(self, slot: int) -> None:
        """Remove whatever is installed under ``slot``."""
        self.settle()
        self.version += 1
        for module in self._wrapped.values():
            module.remove(slot)

    def settle(self) -> None:
        """Let what follows on the compute stream wait for copies under way: pools may move."""
        if self.copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.copy_stream)

    def resident_bytes(self) -> int:
        """Return the device memory that low-rank factors take now, unused pool rows included."""
        return sum(
            pool.numel() * pool.element_size()
            for module in self._wrapped.values()
            if isinstance(module, AdaptedLinear)
            for ranks in module.rank_pools
            for pool in (ranks.a, ranks.b)
        )

    def find(self, name: str) -> AdaptedModule | None:
        """Return the module called ``name`` if an adapter has touched it."""
        return self._wrapped.get(name)

    def original(self, name: str) -> nn.Module:
        """Return the base's own module called ``name``, wrapped or not."""
        wrapped = self._wrapped.get(name)
        return self._model.get_submodule(name) if wrapped is None else wrapped.base

    def module(self, name: str) -> AdaptedModule:
        """Return the module called ``name``, wrapped now if it was not, to be changed."""
        self.version += 1
        wrapped = self._wrapped.get(name)
        if wrapped is None:
            spec = self._layout.modules[name]
            parent_name, _, child = name.rpartition(".")
            parent = self._model.get_submodule(parent_name)
            base = getattr(parent, child)
            axis = self._token_axes.get(name, 1)
            wrapped = _WRAPPERS[spec.kind](base, spec, self._dtype, self._device, axis)
            wrapped.train(base.training)
            setattr(parent, child, wrapped)
            self._wrapped[name] = wrapped
        return wrapped
