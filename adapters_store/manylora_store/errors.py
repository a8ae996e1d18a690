"""Why an adapter was refused, and why the store could not do its work.

The server maps each class to one HTTP status and code. Every message names the tensor, field or
file at fault, what was found and what would be right.
"""

from __future__ import annotations


class AdapterError(Exception):
    """An adapter cannot be accepted; ``message`` says which part of it and why."""

    code = "adapter_invalid"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterInvalidError(AdapterError):
    """The files are broken or contradict themselves (missing tensor, NaN, bad configuration)."""

    code = "adapter_invalid"


class AdapterIncompatibleError(AdapterError):
    """The adapter is sound but was made for another base (module or shape mismatch)."""

    code = "adapter_incompatible"


class AdapterUnsupportedError(AdapterError):
    """The adapter is sound, but uses something this server cannot compute exactly."""

    code = "adapter_unsupported"


class StoreError(Exception):
    """The store cannot do what was asked; ``message`` says what happened and what would help."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnknownAdapterError(StoreError):
    """No adapter of this name is registered."""


class UnknownRevisionError(StoreError):
    """The name never pointed at such a revision, or no such revision is stored."""


class AmbiguousDigestError(StoreError):
    """A digest prefix fits several revisions of the name."""


class StoreBusyError(StoreError):
    """Another writer held the registry for longer than the busy timeout; a retry may succeed."""


class StoreFullError(StoreError):
    """The disk, the quota or the file size limit has no room for what was to be written."""


class StoreUnavailableError(StoreError):
    """The registry or the files failed in another way; the chained exception says how."""


class CombinationError(StoreError):
    """Adapters cannot be combined as asked; ``param`` is the setting at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class TooLargeError(StoreError):
    """What was sent is larger than ``limit`` bytes."""

    def __init__(self, message: str, limit: int) -> None:
        super().__init__(message)
        self.limit = limit
