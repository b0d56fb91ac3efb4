"""One socket between a worker and a rank process: newline-delimited JSON, both ways.

Either side may be gone at any moment: EOF and a broken pipe are answers (``None``, ``False``),
not errors.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

T = TypeVar("T")


class ChannelClosed(Exception):
    """The other side is gone."""


class ProtocolError(Exception):
    """The other side sent what is no message of the protocol."""


class Channel(Generic[T]):
    """Sends any message, receives messages of the type that ``incoming`` validates.

    ``send`` may be called from any thread; ``receive`` from one at a time.
    """

    def __init__(self, sock: socket.socket, incoming: TypeAdapter[T]) -> None:
        self._socket = sock
        self._incoming = incoming
        self._buffer = bytearray()
        self._send_lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: BaseModel) -> None:
        """Blocks while the other side does not read.

        Raises:
            ChannelClosed: the other side is gone.
        """
        data = message.model_dump_json().encode() + b"\n"
        try:
            with self._send_lock:
                self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, timeout: float | None = None) -> T | None:
        """The next message; None when ``timeout`` seconds pass without one (0: do not wait).

        Raises:
            ChannelClosed: the other side is gone and everything it sent was received.
            ProtocolError: a line that is no message.
        """
        while (line := self._take_line()) is None:
            ready, _, _ = select.select([self._socket], [], [], timeout)
            if not ready:
                return None
            try:
                data = self._socket.recv(1 << 20)
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not data:
                raise ChannelClosed("end of stream")
            self._buffer += data
        try:
            return self._incoming.validate_json(line)
        except ValidationError as error:
            raise ProtocolError(
                f"{error.errors(include_url=False)[0]['msg']}: {line[:200]!r}"
            ) from None

    def close(self) -> None:
        self._socket.close()

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
