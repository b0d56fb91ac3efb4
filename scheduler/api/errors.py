"""Every error leaves as ``{"error": {code, message, param, hint, request_id}}``."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from shared.errors import (
    AuthenticationFailed,
    GpuyardError,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    PathNotAllowed,
    PayloadTooLarge,
    Unavailable,
    UploadIncomplete,
)
from shared.explain import explain
from shared.views import ErrorBody, ErrorEnvelope

log = logging.getLogger("gpuyard.api")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that this task or thread works for."""
_UNDEFINED_TABLE = "42P01"
_RETRY_AFTER = "2"


def envelope(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    hint: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error response, with the id of the request at hand."""
    body = {
        "code": code,
        "message": message,
        "param": param,
        "hint": hint,
        "request_id": request_id.get(),
    }
    extra = dict(headers or {})
    if status == 503:
        extra.setdefault("Retry-After", _RETRY_AFTER)
    if status == 401:
        extra.setdefault("WWW-Authenticate", "Bearer")
    return JSONResponse({"error": body}, status_code=status, headers=extra)


def install_error_handlers(app: FastAPI) -> None:
    """Turn every kind of exception that a request can raise into the envelope."""
    app.add_exception_handler(GpuyardError, _on_gpuyard_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(PoolTimeout, _on_busy_store)
    app.add_exception_handler(DBAPIError, _on_store_error)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documented error answers of a route, each with an example."""
    return {status: _response(status) for status in statuses}


_MEANINGS: dict[int, tuple[str, GpuyardError]] = {
    400: (
        "The body did not arrive whole.",
        UploadIncomplete("the connection ended after 500 bytes of the file; nothing was kept"),
    ),
    401: (
        "The API key is missing, wrong or revoked.",
        AuthenticationFailed("the API key is unknown or revoked"),
    ),
    403: (
        "A path outside the folders that jobs may read.",
        PathNotAllowed(
            "data.train: '/etc/passwd' lies outside the folders that jobs may read",
            param="data.train",
            hint="Upload the file, or let the operator open its folder.",
        ),
    ),
    404: (
        "There is no such thing.",
        NotFound("there is no such job", param="job_id", hint="`gpuyard jobs` lists them."),
    ),
    409: (
        "The state of the thing, or the idempotency key, does not admit it.",
        IdempotencyMismatch("this idempotency key came with another spec before"),
    ),
    413: (
        "The body is larger than the service takes.",
        PayloadTooLarge("the file is larger than the 2147483648 bytes that the service takes"),
    ),
    422: (
        "The request can never work as it stands; `param` names what to change.",
        InvalidRequest("limit must be at most 500, not 9999", param="limit"),
    ),
    503: (
        "Postgres cannot be reached right now; the same request may work later.",
        Unavailable("the job store cannot be reached", hint="Try again in a moment."),
    ),
}


def _response(status: int) -> dict[str, Any]:
    description, error = _MEANINGS[status]
    example = ErrorBody(
        code=error.code,
        message=error.message,
        param=error.param,
        hint=error.hint,
        request_id="req_a8ae82f2024de8bc",
    )
    return {
        "model": ErrorEnvelope,
        "description": description,
        "content": {"application/json": {"example": {"error": example.model_dump()}}},
    }


async def _on_gpuyard_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GpuyardError)  # noqa: S101 - registered for it alone
    return envelope(error.status, error.code, error.message, param=error.param, hint=error.hint)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return envelope(422, "invalid_json", f"the body is no JSON: {first['ctx']['error']}")
    # An item of a repeated parameter goes by the parameter's name.
    param = ".".join(part for part in first["loc"][1:] if isinstance(part, str)) or None
    return envelope(422, "invalid_request", explain(first, param or "the body"), param=param)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    codes = {404: "not_found", 405: "method_not_allowed", 416: "range_not_satisfiable"}
    messages = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not possible at {request.url.path}",
    }
    return envelope(
        error.status_code,
        codes.get(error.status_code, "invalid_request"),
        messages.get(error.status_code, str(error.detail)),
        hint="See /docs for what there is." if error.status_code in messages else None,
        headers=dict(error.headers or {}),
    )


async def _on_busy_store(request: Request, _: Exception) -> JSONResponse:
    log.warning("all connections to Postgres are in use")
    return await _on_gpuyard_error(
        request, Unavailable("the job store is busy", hint="Try again in a moment.")
    )


async def _on_store_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DBAPIError)  # noqa: S101
    if getattr(error.orig, "sqlstate", None) == _UNDEFINED_TABLE:
        return await _on_gpuyard_error(
            request,
            Unavailable(
                "the database has no tables yet", hint="Run `python -m scheduler migrate`."
            ),
        )
    raise error
