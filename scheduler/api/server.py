"""The API process: uvicorn around the application."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading

import uvicorn
from fastapi import FastAPI

from scheduler.api.app import create_app
from scheduler.api.context import Context
from scheduler.api.requests import configure_logging
from shared.errors import ConfigurationError, Unavailable
from shared.settings import Settings
from shared.store import Store

log = logging.getLogger("gpuyard.api")
_GRACE = 10
_POOL = 16


class ApiServer(uvicorn.Server):
    """Ends the open streams first when it shuts down: they would hold it for as long as their jobs
    run. Their clients resume at the next server."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._context: Context = app.state.context

    def end(self, *_: object) -> None:
        """Begin to shut down."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._context.wakeups.end_streams()
        await super().shutdown(sockets)


def make_server(app: FastAPI, host: str, port: int) -> ApiServer:
    """A server that logs through this process's logging and not its own."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return ApiServer(app, config)


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Port 0 takes a free one, which is printed.

    It listens at once and answers 503 while Postgres is down, which is announced on stderr; so a
    supervisor sees a live process and not one that crashes in a loop.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    configure_logging()
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    store = Store(settings.database_url, pool_size=_POOL)
    listening = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    print(f"gpuyard API on {address} (documentation: {address}/docs)", file=sys.stderr, flush=True)
    threading.Thread(target=_announce, args=(store,), name="announce", daemon=True).start()
    server = make_server(create_app(settings, store), host, port)
    # uvicorn raises the signal again once it is through, for whoever was there before it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        store.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for ``ApiServer``.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named. With it on, an answer of
    # two writes waits 40 ms for the client's delayed acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            param="port",
            hint="Another process may use it; choose another --port, or 0 for a free one.",
        ) from None
    return listening


def _announce(store: Store) -> None:
    def say(line: str) -> None:
        print(f"gpuyard API: {line}", file=sys.stderr, flush=True)

    try:
        store.wait_until_ready(announce=say)
        say("ready")
    except Unavailable as error:
        say(f"gave up waiting: {error}; requests are answered with 503")
