"""Why an adapter was refused. The server maps each class to one HTTP status and code.

Every message names the tensor, field or file at fault, what was found and what would be right.
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
