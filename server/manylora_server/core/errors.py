"""The error tree, whole: every failure a client can meet, with its HTTP status and code.

Raise the class, never a bare status; ``api.errors`` holds the one mapping to HTTP and to SSE.
Messages name the field, what came and what would be right (DESIGN section 6.2).

::

    ManyloraError (500 internal)
    ├── InvalidRequestError        400 invalid_request
    │   └── ContextLengthError     400 context_length_exceeded
    ├── UnauthorizedError          401 unauthorized
    ├── ForbiddenError             403 forbidden
    ├── AdapterNotFoundError       404 adapter_not_found
    ├── ModelNotFoundError         404 model_not_found
    ├── ExportNotFoundError        404 export_not_found
    ├── AdapterInUseError          409 adapter_in_use
    ├── AdapterConflictError       409 adapter_conflict
    ├── PayloadTooLargeError       413 payload_too_large
    ├── AdapterRefusedError        422 adapter_invalid | adapter_incompatible | adapter_unsupported
    ├── NotReadyError              503 not_ready
    ├── OverloadedError            503 overloaded
    ├── RequestTimeoutError        504 timeout
    ├── EngineFailureError         500 internal
    ├── AdapterLoadError           500 internal
    ├── StorageError               500 internal
    └── StartupError               never sent: the process ends with its message
"""

from __future__ import annotations

from typing import ClassVar

from manylora_store.errors import AdapterError


class ManyloraError(Exception):
    """Base of every error meant for a client; ``param`` is the request field at fault."""

    status: ClassVar[int] = 500
    code: str = "internal"
    error_type: ClassVar[str] = "server_error"
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(ManyloraError):
    """A field is missing, malformed, out of range or not supported."""

    status = 400
    code = "invalid_request"
    error_type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested tokens do not fit the context or the KV cache."""

    code = "context_length_exceeded"


class UnauthorizedError(ManyloraError):
    """No key, or a wrong one."""

    status = 401
    code = "unauthorized"
    error_type = "authentication_error"


class ForbiddenError(ManyloraError):
    """The caller may not use this call."""

    status = 403
    code = "forbidden"
    error_type = "permission_error"


class AdapterNotFoundError(ManyloraError):
    """No adapter has this name or digest."""

    status = 404
    code = "adapter_not_found"
    error_type = "invalid_request_error"


class ModelNotFoundError(ManyloraError):
    """``model`` names neither the base nor an adapter."""

    status = 404
    code = "model_not_found"
    error_type = "invalid_request_error"


class ExportNotFoundError(ManyloraError):
    """No export has this id, or it ended long ago."""

    status = 404
    code = "export_not_found"
    error_type = "invalid_request_error"


class AdapterInUseError(ManyloraError):
    """Running requests use the adapter, so it can be neither removed nor unloaded now."""

    status = 409
    code = "adapter_in_use"
    error_type = "invalid_request_error"


class AdapterConflictError(ManyloraError):
    """Another call is changing, or has changed, what this one is about."""

    status = 409
    code = "adapter_conflict"
    error_type = "invalid_request_error"


class PayloadTooLargeError(ManyloraError):
    """The request's body is over the limit."""

    status = 413
    code = "payload_too_large"
    error_type = "invalid_request_error"


class AdapterRefusedError(ManyloraError):
    """The store refused an adapter; carries the store's own code and message."""

    status = 422
    error_type = "invalid_request_error"

    def __init__(self, cause: AdapterError, *, param: str | None = "adapter") -> None:
        super().__init__(cause.message, param=param)
        self.code = cause.code


class NotReadyError(ManyloraError):
    """The server is starting or draining."""

    status = 503
    code = "not_ready"
    retry_after_s = 2


class OverloadedError(ManyloraError):
    """The request queue is full."""

    status = 503
    code = "overloaded"
    retry_after_s = 1


class RequestTimeoutError(ManyloraError):
    """The request's own deadline (``timeout_s``) passed before it finished."""

    status = 504
    code = "timeout"
    error_type = "timeout_error"


class EngineFailureError(ManyloraError):
    """A step failed on our side; the request is lost, the server goes on."""


class AdapterLoadError(ManyloraError):
    """An adapter that was accepted could not be brought to the device.

    ``digest`` is the adapter's; without one, nothing is wrong with any single adapter.
    """

    def __init__(self, message: str, digest: str | None = None) -> None:
        super().__init__(message)
        self.digest = digest


class StorageError(ManyloraError):
    """The registry or the blobs cannot be read or written: a full disk, a database that is gone."""


class StartupError(ManyloraError):
    """The server cannot start with this model, option or machine."""
