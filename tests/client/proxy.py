"""A TCP proxy that cuts connections where a test says: what a network does on a bad day."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

NEVER = None


@dataclass
class Proxy:
    """``cuts``: for each connection in turn, after how many bytes of the answer it is cut (0: before
    the first, once the whole request went through); connections beyond them are left alone."""

    port: int
    target: int
    cuts: Sequence[int | None]
    connections: int = 0
    cut: int = 0
    listening: socket.socket = field(default_factory=socket.socket)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            limit = self.cuts[self.connections] if self.connections < len(self.cuts) else NEVER
            self.connections += 1
            threading.Thread(target=self._join, args=(client, limit), daemon=True).start()

    def _join(self, client: socket.socket, limit: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            up = threading.Thread(target=_copy, args=(client, server), daemon=True)
            up.start()
            left = limit
            with contextlib.suppress(OSError):
                # Read even when nothing may pass: an answer means that the service has acted.
                while data := server.recv(65536):
                    if left is not None and len(data) > left:
                        client.sendall(data[:left])
                        self.cut += 1
                        break
                    client.sendall(data)
                    left = None if left is None else left - len(data)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            up.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@contextmanager
def proxy_to(port: int, cuts: Sequence[int | None]) -> Iterator[Proxy]:
    """A proxy to a port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    proxy = Proxy(listening.getsockname()[1], port, cuts, listening=listening)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        # shutdown wakes accept(); close alone would not.
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(timeout=5)


MakeProxy = Callable[..., Proxy]
