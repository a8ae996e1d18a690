"""Keeps ``torch._dynamo`` from being imported where nothing is compiled.

Half a second of a start went into them. transformers and bitsandbytes only mark functions for the
compiler; and torch, which computes shapes on the meta device in Python, asks it only to stay away.

While ``compiler_deferred`` lasts, stand-ins in ``sys.modules`` answer that much. Asked for anything
else, a stand-in makes way for the real module and hands the question on, so that all works as
without it and only the time is lost. Whenever the real compiler is imported, in the block or long
after it, the functions that were marked are treated as if it had been there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from types import FunctionType, ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"


@contextmanager
def compiler_deferred() -> Iterator[None]:
    """Stand in for the compiler until the block ends, unless it has been imported already."""
    import torch

    if _COMPILER in sys.modules:
        yield
        return
    if _ALLOWED not in sys.meta_path:
        sys.meta_path.insert(0, _ALLOWED)
    stand_ins = (_compiler(), _indexing())
    sys.modules.update((module.__name__, module) for module in stand_ins)
    compile_now = torch.compile
    torch.compile = _compile_at_first_call(compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now
        for module in stand_ins:
            module.make_way()


class _StandIn(ModuleType):
    """Has ``members`` until it makes way; from then on it is another name of the real module."""

    def __init__(self, name: str, **members: Any) -> None:
        super().__init__(name)
        self.__dict__.update(members)
        self._members = tuple(members)

    def make_way(self) -> None:
        """Let the next import find the real module."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        for name in self._members:
            self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        # Importing asks everybody for some of these. A package is asked for its path where a module
        # in it is wanted.
        if name.startswith("__") and (name, self.__name__) != ("__path__", _COMPILER):
            raise AttributeError(name)
        self.make_way()
        return getattr(importlib.import_module(self.__name__), name)


def _compiler() -> _StandIn:
    def allow_in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        _ALLOWED.functions.append(function)
        return function

    def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)["_dynamo_marked_constant"] = True
        return function

    def disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None:
            return functools.partial(disable, recursive=recursive, **options)

        @functools.cache
        def kept_away() -> Any:
            return importlib.import_module(_COMPILER).disable(function, recursive, **options)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            # As long as there is no compiler, there is none to keep away.
            absent = isinstance(sys.modules.get(_COMPILER), _StandIn | None)
            return (function if absent else kept_away())(*arguments, **named)

        return call

    return _StandIn(
        _COMPILER,
        allow_in_graph=allow_in_graph,
        assume_constant_result=assume_constant_result,
        disable=disable,
    )


def _indexing() -> _StandIn:
    def transform_get_item_to_index(*arguments: Any, **named: Any) -> Any:
        real = importlib.import_module(_INDEXING)
        return real.TransformGetItemToIndex(*arguments, **named)

    return _StandIn(_INDEXING, TransformGetItemToIndex=transform_get_item_to_index)


def _compile_at_first_call(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``torch.compile`` that wraps functions without asking the compiler yet."""

    @functools.wraps(compile_now)
    def compile_later(model: Any = None, **options: Any) -> Any:
        if not isinstance(model, FunctionType):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    return compile_later


class _Allowed(MetaPathFinder):
    """The functions that the compiler, when it is imported, is to be told that it may call."""

    def __init__(self) -> None:
        self.functions: list[Callable[..., Any]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the compiler's own spec with a loader that tells it."""
        if name == _COMPILER:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and isinstance(spec.loader, SourceFileLoader):
                spec.loader = _Telling(spec.loader.name, spec.loader.path)
            return spec
        if name.startswith(f"{_COMPILER}.") and (module := sys.modules.get(name)) is not None:
            # The compiler was imported as Python looked for this module's parent, and brought it.
            return spec_from_loader(name, _Imported(module))
        return None


_ALLOWED = _Allowed()


class _Telling(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for function in _ALLOWED.functions:
            module.allow_in_graph(function)


class _Imported(Loader):
    """Gives a module that has been imported already."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
