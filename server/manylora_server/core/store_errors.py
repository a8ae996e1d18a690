"""The one mapping from what the adapter store raises to what a client is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manylora_server.core.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
    ManyloraError,
    OverloadedError,
    PayloadTooLargeError,
    StorageError,
)
from manylora_store.errors import (
    AdapterError,
    AmbiguousDigestError,
    CombinationError,
    StoreBusyError,
    StoreError,
    TooLargeError,
    UnknownAdapterError,
    UnknownRevisionError,
)

_ANSWERS: tuple[tuple[type[StoreError], type[ManyloraError]], ...] = (
    (UnknownAdapterError, AdapterNotFoundError),
    (UnknownRevisionError, AdapterNotFoundError),
    (AmbiguousDigestError, InvalidRequestError),
    (TooLargeError, PayloadTooLargeError),
    (StoreBusyError, OverloadedError),
)


def client_error(error: AdapterError | StoreError, *, param: str | None) -> ManyloraError:
    """Return what a client is told of ``error``; ``param`` is the request's field it is about.

    A store that cannot do its work (full, out of reach) is nobody's field, so it carries none.
    """
    if isinstance(error, AdapterError):
        return AdapterRefusedError(error, param=param)
    if isinstance(error, CombinationError):
        return InvalidRequestError(f"{error.message}.", param=error.param)
    for kind, answer in _ANSWERS:
        if isinstance(error, kind):
            return answer(error.message, param=param)
    return StorageError(error.message)


@contextmanager
def store_errors_translated(*, param: str | None = "adapter") -> Iterator[None]:
    """Raise the store's errors within the block as the ``ManyloraError`` a client is told."""
    try:
        yield
    except (AdapterError, StoreError) as error:
        raise client_error(error, param=param) from error
