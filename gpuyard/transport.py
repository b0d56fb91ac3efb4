"""HTTP to the service: one place for keys, retries, and turning answers back into errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from gpuyard.connection import Connection
from shared.errors import AuthenticationFailed, GpuyardError, Unavailable, error_for_code
from shared.views import ErrorEnvelope

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

RETRYABLE = frozenset({429, 502, 503, 504})
"""Answers that say nothing about the request: the same one may work in a moment."""
FIRST_DELAY, MAX_DELAY = 0.2, 5.0
SILENCE = 45.0
"""Seconds without a byte after which a stream is taken for dead: the service sends a keep-alive
every 15 s at the latest."""


class Transport:
    """Sends requests, and again as long as that can do no harm and ``patience`` seconds last."""

    def __init__(
        self,
        connection: Connection,
        patience: float,
        on_retry: Callable[[Unavailable], None] | None = None,
    ) -> None:
        headers = {"User-Agent": "gpuyard-client"}
        if connection.api_key:
            headers["Authorization"] = f"Bearer {connection.api_key}"
        self.connection = connection
        self._patience = patience
        self._on_retry = on_retry
        self._http = httpx.Client(
            base_url=connection.url,
            headers=headers,
            timeout=httpx.Timeout(SILENCE, connect=5.0),
            # Through a proxy of the environment the local stack would look unreachable.
            trust_env=not _is_loopback(connection.url),
        )

    def close(self) -> None:
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        json: Any = None,
        body: Callable[[], Iterator[bytes]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """One answer, read whole. Only for requests that may be repeated.

        ``body`` makes the request body anew for each try.

        Raises:
            GpuyardError: the service's own error, in its class.
            Unavailable: it could not be reached within ``patience``.
        """

        def once() -> httpx.Response:
            with self._reaching():
                answer = self._http.request(
                    method,
                    path,
                    params=_given(params),
                    json=json,
                    content=body() if body else None,
                    headers=headers,
                )
            raise_for(answer)
            return answer

        return self.again(once)

    def get(self, path: str, view: type[M], **params: Any) -> M:
        return self.read(self.request("GET", path, params=params), view)

    def get_list(self, path: str, item: type[T], **params: Any) -> list[T]:
        """A list that the service gives whole, bare or as a page."""
        answer = self.request("GET", path, params=params).json()
        items = answer["items"] if isinstance(answer, dict) else answer
        return [TypeAdapter(item).validate_python(one) for one in items]

    def probe(self, path: str, view: type[M]) -> M:
        """An answer that is one whatever its status, and is worth no second try."""
        with self._reaching():
            answer = self._http.request("GET", path)
        return self.read(answer, view)

    def read(self, answer: httpx.Response, view: type[M]) -> M:
        try:
            return view.model_validate_json(answer.content)
        except ValidationError:
            raise _not_gpuyard(answer) from None

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer to be read as it comes. One try: who reads knows where to go on.

        Raises:
            Unavailable: the connection failed, at its start or while it was read.
        """
        with (
            self._reaching(),
            self._http.stream("GET", path, params=_given(params), headers=headers) as answer,
        ):
            if answer.is_error:
                answer.read()
            raise_for(answer)
            yield answer

    def again(self, once: Callable[[], T]) -> T:
        """``once`` until it does not raise ``Unavailable``, for as long as ``patience`` lasts."""
        pauses = self.pauses()
        while True:
            try:
                return once()
            except Unavailable as error:
                pauses.after(error)

    def pauses(self) -> Pauses:
        """For one thing that is tried until patience is at its end."""
        return Pauses(self._patience, self._on_retry)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.InvalidURL as error:
            raise GpuyardError(f"{self.connection.url} is no address: {error}") from None
        except (httpx.TransportError, httpx.StreamError) as error:
            raise unreachable(self.connection, error) from error


class Pauses:
    """Waits between tries: twice as long each time, at least what the service asked for."""

    def __init__(
        self, patience: float, on_retry: Callable[[Unavailable], None] | None = None
    ) -> None:
        self._patience = patience
        self._on_retry = on_retry
        self.reset()

    def reset(self) -> None:
        """Something arrived: the next failure is the first one again."""
        self._deadline: float | None = None
        self._delay = FIRST_DELAY

    def after(self, error: Unavailable) -> None:
        """Sleep, or raise ``error`` when patience is at its end."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience
        asked = error.retry_after or 0.0
        # Jitter, so that the clients of a restarted service do not come back in step.
        delay = max(asked, self._delay * random.uniform(0.5, 1.0))  # noqa: S311
        if now + delay > self._deadline:
            raise error
        if self._on_retry is not None:
            self._on_retry(error)
        time.sleep(delay)
        self._delay = min(self._delay * 2, MAX_DELAY)


def raise_for(answer: httpx.Response) -> None:
    """Nothing for a success; otherwise the error that the envelope names, in its class.

    Raises:
        Unavailable: for what may work in a moment; carries ``retry_after`` (seconds or None).
        GpuyardError: everything else; carries ``request_id`` where the service gave one.
    """
    if answer.is_success:
        return
    try:
        body = ErrorEnvelope.model_validate_json(answer.content).error
    except ValidationError:
        error = _not_gpuyard(answer)
    else:
        kind = error_for_code(body.code, answer.status_code)
        error = kind(body.message, param=body.param, hint=body.hint, code=body.code)
        error.request_id = body.request_id
    if answer.status_code in RETRYABLE and not isinstance(error, Unavailable):
        error = Unavailable(error.message, param=error.param, hint=error.hint)
    if isinstance(error, Unavailable):
        error.retry_after = _seconds(answer.headers.get("Retry-After"))
    raise error


def unreachable(connection: Connection, error: Exception) -> Unavailable:
    """What a failed connection means to the user."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        what = f"no gpuyard service answers at {connection.url}"
    else:
        what = f"the connection to {connection.url} broke"
    return Unavailable(
        f"{what} ({str(error) or type(error).__name__})",
        hint=f"Is it running? Its address came from {connection.origin}.",
    )


def _not_gpuyard(answer: httpx.Response) -> GpuyardError:
    text = " ".join(answer.text.split())[:120]
    message = f"{answer.url} answered {answer.status_code} and not as gpuyard does: {text!r}"
    hint = "Is this the address of a gpuyard API?"
    if answer.status_code == AuthenticationFailed.status:
        return AuthenticationFailed(message, hint=hint)
    return GpuyardError(message, hint=hint)


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None  # a date: our own delays will do


def _given(params: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in params.items() if v is not None} if params else None


def _is_loopback(url: str) -> bool:
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
