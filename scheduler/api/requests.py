"""What every request gets: an id that is in its logs and its answer, one log line, and an envelope
also for what nobody foresaw."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scheduler.api.errors import envelope, request_id

log = logging.getLogger("gpuyard.api")
_USABLE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_QUIET = ("/healthz", "/readyz")
"""Asked every few seconds by monitors: logged only when something is wrong."""


class RequestContext:
    """Outermost middleware (plain ASGI, so that streams stay streams).

    An ``X-Request-Id`` of the client is kept if it is fit for a log line, else one is made. An
    unexpected exception is logged with its traceback and answered as ``internal_error``; where the
    answer had begun, the connection is closed, so that a cut-off stream cannot look complete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _USABLE_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        token = request_id.set(id)
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info("the client went away from %s %s", scope["method"], scope["path"])
        except Exception:
            # Last of all: what no handler knew. The log has the traceback, and the answer its id.
            log.exception("unexpected error in %s %s", scope["method"], scope["path"])
            if status == 0:
                answer = envelope(
                    500,
                    "internal_error",
                    "something went wrong in the service; this is a defect, not your mistake",
                    hint=f"Report it with the request id {id}.",
                )
                await answer(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _QUIET or status >= 500:
                log.info(
                    "%s %s -> %d in %.0f ms",
                    scope["method"],
                    scope["path"],
                    status,
                    (time.monotonic() - started) * 1000,
                )
            request_id.reset(token)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False)


class RequestIdFilter(logging.Filter):
    """Puts the id of the request at hand on every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def configure_logging(level: str = "INFO") -> None:
    """One JSON object a line on stderr, for the whole process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
