"""One adapter on its way into a slot, module by module, between the steps of the engine."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Protocol

import torch

from manylora_store.compiler.canonical import CompiledAdapter, ModulePatch


class PatchedModule(Protocol):
    """A module that takes patches; see ``adapted.AdaptedModule``."""

    def reserve(self, slot: int, patch: ModulePatch) -> None:
        """Make room."""

    def fill(self, slot: int, patch: ModulePatch) -> None:
        """Copy."""


class PatchedModules(Protocol):
    """The modules of a base; see ``modules.AdaptedModules``."""

    copy_stream: torch.cuda.Stream | None

    def module(self, name: str) -> PatchedModule:
        """Return one of them."""

    def remove(self, slot: int) -> None:
        """Forget a slot's patches."""

    def settle(self) -> None:
        """Order what follows after copies under way."""


class Installation:
    """Copies ``adapter``'s patches under ``slot``; a failure, or ``cancel``, removes them again.

    On a GPU, room is made on the compute stream (pools may move there) and filled on
    ``copy_stream`` from pinned host memory, so that copies run beside the steps' kernels. Rows may
    use the slot once ``advance`` has returned true.
    """

    def __init__(self, modules: PatchedModules, slot: int, adapter: CompiledAdapter) -> None:
        self._modules = modules
        self._slot = slot
        self._stream = modules.copy_stream
        self._work = self._on_host(adapter) if self._stream is None else self._on_gpu(adapter)
        self._copied: torch.cuda.Event | None = None
        self._submitted = False

    def advance(self, until: float = 0.0) -> bool:
        """Go on until ``time.perf_counter()`` passes ``until``, by one module at least.

        Returns whether everything is in place. What a module raises is raised, after everything
        was removed.
        """
        try:
            while not self._submitted:
                if next(self._work, False) is False:
                    self._submitted = True
                elif time.perf_counter() >= until:
                    return False
        except BaseException:
            self.cancel()
            raise
        if self._copied is None:
            return True
        return bool(self._copied.query())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Go on until everything is in place."""
        self.advance(float("inf"))
        if self._copied is not None:
            self._copied.synchronize()

    def cancel(self) -> None:
        """Remove what is there."""
        self._work.close()
        self._modules.remove(self._slot)

    def _on_host(self, adapter: CompiledAdapter) -> Generator[bool, None, None]:
        for name, patch in adapter.patches.items():
            module = self._modules.module(name)
            module.reserve(self._slot, patch)
            module.fill(self._slot, patch)
            yield True

    def _on_gpu(self, adapter: CompiledAdapter) -> Generator[bool, None, None]:
        stream = self._stream
        assert stream is not None
        for name, patch in adapter.patches.items():
            # Before each, since other work may have been enqueued since the last.
            self._modules.settle()
            self._modules.module(name).reserve(self._slot, patch)
            yield True
        for name, patch in adapter.patches.items():
            # The pool may have moved, for this adapter or for another one, since the last.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            with torch.cuda.stream(stream):
                self._modules.module(name).fill(self._slot, patch)
            yield True
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(stream)
