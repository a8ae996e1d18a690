"""Which implementation computes each operation.

Backends register functions by operation name; exactly one is selected per operation. Selecting a
backend that does not implement an operation is an error, never a silent slow path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

REFERENCE = "reference"

F = TypeVar("F", bound=Callable[..., Any])

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_selected: dict[str, str] = {}
active: dict[str, Callable[..., Any]] = {}


def register(operation: str, backend: str) -> Callable[[F], F]:
    """Register the decorated function as ``backend``'s implementation of ``operation``.

    The reference backend is selected until ``select_backend`` says otherwise.
    """

    def decorate(function: F) -> F:
        _implementations.setdefault(operation, {})[backend] = function
        if backend == REFERENCE:
            _selected[operation] = backend
            active[operation] = function
        return function

    return decorate


def operations() -> tuple[str, ...]:
    """Return the names of all operations."""
    return tuple(_implementations)


def available_backends(operation: str) -> tuple[str, ...]:
    """Return the names of the backends that implement ``operation``, the reference first."""
    return tuple(_implementations[operation])


def selected_backend(operation: str) -> str:
    """Return the name of the backend that computes ``operation`` now."""
    return _selected[operation]


def select_backend(operation: str, backend: str) -> None:
    """Let ``backend`` compute ``operation`` from the next call on.

    Raises ``LookupError`` that names the backends that could.
    """
    implementations = _implementations.get(operation)
    if implementations is None:
        raise LookupError(
            f"no operation is called {operation!r}; there are {sorted(_implementations)}"
        )
    if backend not in implementations:
        raise LookupError(
            f"backend {backend!r} does not implement {operation!r}; "
            f"these do: {', '.join(implementations)}"
        )
    _selected[operation] = backend
    active[operation] = implementations[backend]
