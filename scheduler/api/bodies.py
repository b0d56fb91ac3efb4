"""Reading request bodies with a limit, and saying it when they end early."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NoReturn

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from shared.errors import InvalidRequest, PayloadTooLarge, UploadIncomplete

MAX_JSON = 64 * 1024 * 1024
_DRAIN = 16 * 1024 * 1024
"""What is read and thrown away of a body that is too large, so that the client, which sends all
before it reads, gets the answer and not a reset connection."""


async def read_json(request: Request) -> Any:
    """The JSON of the body.

    Raises:
        InvalidRequest: ``invalid_json``: says where it breaks off.
        PayloadTooLarge: over 64 MiB. UploadIncomplete: the client went away.
    """
    hint = "Upload the rows (POST /v1/files) and name the file as the spec's input."
    parts = [chunk async for chunk in read_body(request, MAX_JSON, "the spec", hint)]
    return await run_in_threadpool(_parse, b"".join(parts))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_refuse)
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise _invalid(what if body.strip() else "it is empty") from None
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError as error:
        raise _invalid(str(error)) from None


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body is no JSON: {what}",
        code="invalid_json",
        hint="Send one JSON object, see /docs for examples.",
    )


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


async def read_body(request: Request, limit: int, what: str, hint: str) -> AsyncIterator[bytes]:
    """The body, piece by piece; ``hint`` is for one that is too large.

    Raises:
        PayloadTooLarge: it is longer than ``limit`` bytes, or says so before it is read.
        UploadIncomplete: the client went away before all of it had come.
    """
    announced = request.headers.get("content-length", "")
    too_large = PayloadTooLarge(
        f"{what} is larger than the {limit} bytes that the service takes", hint=hint
    )
    if announced.isascii() and announced.isdigit() and int(announced) > limit:
        # A client that asks before it sends (Expect: 100-continue) need not send at all.
        if "expect" not in request.headers:
            await _drain(request.stream())
        raise too_large
    received = 0
    stream = request.stream()
    try:
        async for chunk in stream:
            received += len(chunk)
            if received > limit:
                await _drain(stream)
                raise too_large
            if chunk:
                yield chunk
    except ClientDisconnect:
        raise UploadIncomplete(
            f"the connection ended after {received} bytes of {what}; nothing of it was kept",
            hint="Send it again.",
        ) from None


async def _drain(stream: AsyncIterator[bytes]) -> None:
    thrown_away = 0
    try:
        async for chunk in stream:
            thrown_away += len(chunk)
            if thrown_away > _DRAIN:
                return
    except ClientDisconnect:
        return
