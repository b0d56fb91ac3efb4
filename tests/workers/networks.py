"""Two network namespaces joined by a pair of virtual interfaces: what two hosts are to one another.

Neither reaches the loopback of the other, or that of the machine. The broker, which listens there,
is brought to the loopback of each.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

_NEW_NETWORK = 0x40000000


@cache
def can_be_made() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"gpuyard-{os.getpid()}-try"
    with suppress(subprocess.CalledProcessError):
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
        return True
    return False


class TwoNetworks:
    """``inside[i]`` runs a command in network i, which has ``addresses[i]``."""

    addresses = ("10.213.7.1", "10.213.7.2")

    def __init__(self, broker_port: int) -> None:
        self._names = [f"gpuyard-{os.getpid()}-{side}" for side in "ab"]
        self.inside = [("ip", "netns", "exec", name) for name in self._names]
        self._broker_port = broker_port
        self._listeners: list[socket.socket] = []

    def __enter__(self) -> TwoNetworks:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            one, other = self._names
            _ip("link", "add", "gy0", "netns", one, "type", "veth", "peer", "gy0", "netns", other)
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "gy0")
                for interface in ("gy0", "lo"):
                    _ip("-n", name, "link", "set", interface, "up")
                self._bring_broker_to(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()
        for name in self._names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def _bring_broker_to(self, name: str) -> None:
        def listen() -> None:
            # A socket stays in the network that its thread was in when it was made.
            with Path(f"/run/netns/{name}").open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _NEW_NETWORK):
                    raise OSError(ctypes.get_errno(), "setns")
            self._listeners.append(socket.create_server(("127.0.0.1", self._broker_port)))

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        threading.Thread(target=self._serve, args=(self._listeners[-1],), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it is closed in the end
            while True:
                theirs, _ = listener.accept()
                ours = socket.create_connection(("127.0.0.1", self._broker_port))
                for source, sink in ((theirs, ours), (ours, theirs)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
