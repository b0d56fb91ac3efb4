"""The Python client of the service: ``from gpuyard import Client``."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from gpuyard.calls.fleet import FleetCalls
from gpuyard.calls.models import ModelCalls
from gpuyard.calls.sweeps import SweepCalls
from gpuyard.connection import find_connection
from gpuyard.transport import Transport
from shared.errors import Unavailable


class Client(ModelCalls, SweepCalls, FleetCalls):
    """Talks to one service. Safe to share among threads; close it, or use it as a context manager.

    Requests that can be repeated without harm are repeated for ``patience`` seconds when the
    connection breaks or the service answers that it is busy; ``on_retry`` hears of each time. Every
    error of the service is raised as its class of ``shared.errors``, with its code, parameter, hint
    and request id.

    Raises:
        ConfigurationError: neither ``url``, nor ``GPUYARD_URL``, nor a running local stack names one.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience: float = 30.0,
        on_retry: Callable[[Unavailable], None] | None = None,
    ) -> None:
        self.connection = find_connection(url, api_key)
        self._transport = Transport(self.connection, patience, on_retry)
        self._uploaded: dict[tuple[str, str], str] = {}

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
