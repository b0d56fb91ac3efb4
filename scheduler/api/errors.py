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

from shared.errors import GpuyardError, Unavailable
from shared.views import ErrorEnvelope

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
    """The documented error answers of a route."""
    return {
        status: {"model": ErrorEnvelope, "description": _MEANINGS[status]} for status in statuses
    }


_MEANINGS = {
    400: "The body did not arrive whole.",
    401: "The API key is missing, wrong or revoked.",
    403: "A path outside the folders that jobs may read.",
    404: "There is no such thing.",
    409: "The state of the thing, or the idempotency key, does not admit it.",
    413: "The body is larger than the service takes.",
    422: "The request can never work as it stands; `param` names what to change.",
    503: "Postgres cannot be reached right now; the same request may work later.",
}


async def _on_gpuyard_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GpuyardError)  # noqa: S101 - registered for it alone
    return envelope(error.status, error.code, error.message, param=error.param, hint=error.hint)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    param = ".".join(where) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return envelope(422, "invalid_request", message, param=param)


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
