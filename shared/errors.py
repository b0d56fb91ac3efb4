"""The tree of errors, in one place.

Every error a user can meet has a stable ``code``, says what is wrong, names the parameter it is
about, and gives a hint what to do. The API turns each into the one envelope
``{"error": {"code", "message", "param", "hint", "request_id"}}``; the SDK turns that back into the same class.
"""

from __future__ import annotations

from collections.abc import Iterator


class GpuyardError(Exception):
    """Base of all errors that are meant for people.

    ``status`` is the HTTP status the API answers with, ``exit_code`` what the CLI exits with.
    """

    code = "error"
    status = 500
    exit_code = 1
    request_id: str | None = None
    """Of the answer that carried it, for looking it up in the service's logs."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message


class InvalidRequest(GpuyardError):
    """The request can never work as it stands: a spec, a file or a parameter is wrong."""

    code = "invalid_request"
    status = 422
    exit_code = 2


class InvalidSpec(InvalidRequest):
    """A job spec that contradicts itself, has unknown fields or values out of range."""

    code = "invalid_spec"


class ModelNotFound(InvalidRequest):
    """The model reference names nothing that this service can read."""

    code = "model_not_found"


class UnsupportedModel(InvalidRequest):
    """The model exists and cannot do what the spec asks of it."""

    code = "unsupported_model"


class DataError(InvalidRequest):
    """An input file is missing, unreadable, empty, malformed or lacks a column."""

    code = "data_error"


class PathNotAllowed(InvalidRequest):
    """A path outside the folders that the operator has opened to jobs."""

    code = "path_not_allowed"
    status = 403


class Unsatisfiable(InvalidRequest):
    """No device of the fleet can ever meet the requirements."""

    code = "unsatisfiable"


class PayloadTooLarge(InvalidRequest):
    code = "payload_too_large"
    status = 413


class UploadIncomplete(InvalidRequest):
    """An upload ended before all of it had arrived; nothing of it was kept."""

    code = "upload_incomplete"
    status = 400


class AuthenticationFailed(GpuyardError):
    code = "authentication_failed"
    status = 401
    exit_code = 4


class NotFound(GpuyardError):
    code = "not_found"
    status = 404
    exit_code = 3


class Conflict(GpuyardError):
    """The state of the thing does not admit the request (finished jobs cannot be cancelled)."""

    code = "conflict"
    status = 409
    exit_code = 5


class IdempotencyMismatch(Conflict):
    """The same idempotency key came with another spec."""

    code = "idempotency_mismatch"


class Unavailable(GpuyardError):
    """A part the service needs cannot be reached right now; the same request may work later."""

    code = "unavailable"
    status = 503
    exit_code = 6
    retry_after: float | None = None
    """Seconds after which the service asked to be tried again."""


class ConfigurationError(GpuyardError):
    """A setting of this process is wrong; says which and what to change."""

    code = "configuration_error"
    exit_code = 2


class AlreadyRunning(ConfigurationError):
    """A second instance on the same data folder."""

    code = "already_running"
    exit_code = 5


def _tree(cls: type[GpuyardError]) -> Iterator[type[GpuyardError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def error_for_code(code: str, status: int) -> type[GpuyardError]:
    """The class that carries ``code``; for codes of a newer server, the nearest by HTTP status."""
    classes = list(_tree(GpuyardError))
    for cls in classes:
        if cls.code == code:
            return cls
    for cls in classes:
        if cls.status == status:
            return cls
    return GpuyardError
