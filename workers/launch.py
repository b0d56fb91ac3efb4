"""Starting and ending ranks from the Celery worker, which never loads torch.

``launch`` asks the nursery for a fork and returns a ``RankProcess``. From then on the worker talks
to the attempt's supervisor and to the rank directly: a nursery that dies meanwhile harms neither.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import Unavailable
from shared.messages import FromRank, Report
from workers.channel import Channel
from workers.sweep import ProcessId, kill_trees
from workers.tree import Exit, unix_address

__all__ = ["Exit", "LaunchFailed", "RankProcess", "launch"]

log = logging.getLogger(__name__)

MARGIN = 5.0
"""Seconds a supervisor may take beyond the grace before it is taken for stuck."""

_CONNECT_PAUSE = 0.05
_PATIENCE = 10.0
_MAX_PACKET = 1 << 16


class LaunchFailed(Unavailable):
    """No rank could be started on this host; says why."""

    code = "launch_failed"


def launch(
    nursery_socket: Path,
    kind: str,
    *,
    env: Mapping[str, str],
    log_path: Path,
    timeout: float = 60.0,
    abandoned_grace: float = 2.0,
) -> RankProcess:
    """Start a rank of ``kind`` ("train", "engine", "measure") with ``env`` added to its environment.

    Waits up to ``timeout`` seconds for a nursery that is not up (yet). The rank has
    ``abandoned_grace`` seconds between SIGTERM and SIGKILL should this process die.
    stdout and stderr of the rank and all it starts are appended to ``log_path``.

    Raises:
        LaunchFailed: there is no nursery, or it refused (unknown kind, a log it cannot write).
    """
    request = {
        "kind": kind,
        "env": dict(env),
        "log_path": str(log_path),
        "abandoned_grace": abandoned_grace,
    }
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _ask_for_rank(nursery_socket, request, deadline)
        except OSError as error:
            # Not up yet, or it died over the request, before it had forked anything.
            if time.monotonic() + _CONNECT_PAUSE >= deadline:
                raise LaunchFailed(
                    f"no rank was started within {timeout:g} s: {nursery_socket}: {error}",
                    hint="The worker's nursery process is down: see the log of `gpuyard worker`.",
                ) from None
        time.sleep(_CONNECT_PAUSE)


class RankProcess:
    """A rank with its supervisor. To be used from one thread at a time, and to be ended: with
    ``end()``, whatever ``poll`` says, or as a context manager."""

    def __init__(
        self,
        nursery_socket: Path,
        control: socket.socket,
        channel: socket.socket,
        supervisor: ProcessId,
        rank: ProcessId,
    ) -> None:
        self.channel: Channel[Report] = Channel(channel, FromRank)
        self.supervisor = supervisor
        self.rank = rank
        self._nursery_socket = nursery_socket
        self._control = control
        self._buffer = b""
        self._exit: Exit | None = None
        self._gone = False

    @property
    def pid(self) -> int:
        """Of the rank itself."""
        return self.rank.pid

    def fileno(self) -> int:
        """Readable when ``poll`` has something new to say."""
        return self._control.fileno()

    def poll(self) -> Exit | None:
        """How the rank ended; None while it runs or something it started is still being ended."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Like ``poll``, after waiting up to ``timeout`` seconds (None: for ever)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._exit is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._control], [], [], left)[0]:
                return None
            line = self._read_line()
            if line is not None:
                self._exit = Exit(line["exit_code"], line["signal"], line["swept"])
            elif self._gone:
                self._exit = Exit(None, None, lost=True)
        return self._exit

    def end(self, grace: float) -> Exit:
        """End the rank and everything it started; returns once no process of the tree lives.

        The rank gets SIGTERM and ``grace`` seconds, then SIGKILL. A supervisor that does not do
        this in time, or was killed, is done without. Blocks for as long as a process is stuck in
        the kernel, with a warning now and then. May be called again; ``channel`` stays open, so
        that the last reports can still be received.
        """
        end = self.poll()
        if end is None:
            # A broken pipe: the supervisor is gone, as wait() is about to see.
            with contextlib.suppress(OSError):
                self._control.sendall(b"end %g\n" % grace)
            end = self.wait(grace + MARGIN)
        if end is None:
            log.warning("supervisor %d does not answer: ending its tree", self.supervisor.pid)
            end = self._exit = Exit(None, None, lost=True)
        if end.lost:
            self._end_from_outside()
        else:
            self._await_supervisor()
        return end

    def close(self) -> None:
        """Close both sockets. A rank that still runs is ended by its supervisor."""
        self._control.close()
        self.channel.close()

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end(grace=0)
        finally:
            self.close()

    def _await_supervisor(self) -> None:
        """It has reported, with nothing alive below it, and has only to exit."""
        while not self._gone and select.select([self._control], [], [], MARGIN)[0]:
            self._read_line()
        _kill_for_certain([self.supervisor])

    def _end_from_outside(self) -> None:
        """For a supervisor that is dead or stuck: what ``/proc`` shows first, then the nursery,
        whose children the orphans have become."""
        _kill_for_certain([self.supervisor, self.rank])
        try:
            while left := _settle(self._nursery_socket):
                log.warning("%d orphans of supervisor %d still live", left, self.supervisor.pid)
        except OSError as error:
            # The host manager is the subreaper above the nursery and ends its orphans.
            log.warning("the nursery cannot say whether orphans are left: %s", error)

    def _read_line(self) -> dict[str, Any] | None:
        """The next line on control that is complete; ``_gone`` is set at its end."""
        try:
            data = self._control.recv(4096)
        except ConnectionError:
            data = b""
        self._gone = not data
        line, newline, rest = (self._buffer + data).partition(b"\n")
        if not newline:
            self._buffer = line
            return None
        self._buffer = rest
        return dict(json.loads(line))


def _ask_for_rank(path: Path, request: Mapping[str, object], deadline: float) -> RankProcess:
    """One request over fresh sockets. Raises OSError when it is worth asking again."""
    with contextlib.ExitStack() as on_failure:
        control, their_control = socket.socketpair()
        on_failure.enter_context(control)
        channel, their_channel = socket.socketpair()
        on_failure.enter_context(channel)
        with their_control, their_channel, _connect(path, deadline) as nursery:
            fds = [their_control.fileno(), their_channel.fileno()]
            socket.send_fds(nursery, [json.dumps(request).encode()], fds)
            their_control.close()
            their_channel.close()
            # A nursery that dies now may have forked the supervisor already, which then speaks on
            # control all the same; if it had not, control has no other holder left and ends.
            answer: dict[str, Any] = {}
            with contextlib.suppress(ConnectionError):
                answer = _receive(nursery)
        if "error" in answer:
            raise LaunchFailed(f"the nursery refused to start a rank: {answer['error']}")
        started = _first_line(control, deadline)
        if "failed" in started:
            raise LaunchFailed(f"the rank could not be started: {started['failed']}")
        on_failure.pop_all()
        supervisor, rank = ProcessId(*started["supervisor"]), ProcessId(*started["rank"])
        return RankProcess(path, control, channel, supervisor, rank)


def _first_line(control: socket.socket, deadline: float) -> dict[str, Any]:
    """What the supervisor says once it has forked the rank. Closing ``control`` ends that rank."""
    control.settimeout(max(1.0, deadline - time.monotonic()))
    with control.makefile("rb", buffering=0) as lines:
        line = lines.readline()
    control.settimeout(None)
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the rank's supervisor ended before it had forked the rank")
    return dict(json.loads(line))


def _settle(path: Path) -> int:
    """Have the nursery end all orphans; how many still live."""
    with _connect(path, time.monotonic() + _PATIENCE) as nursery:
        nursery.send(b'{"settle": true}')
        answer = _receive(nursery)
    if "error" in answer:
        raise OSError(answer["error"])
    return int(answer["orphans"])


def _connect(path: Path, deadline: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(max(1.0, deadline - time.monotonic()))
        with unix_address(path) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _receive(nursery: socket.socket) -> dict[str, Any]:
    data = nursery.recv(_MAX_PACKET)
    if not data:
        raise ConnectionResetError("the nursery ended before it had answered")
    return dict(json.loads(data))


def _kill_for_certain(processes: list[ProcessId]) -> None:
    while left := kill_trees(processes, limit=_PATIENCE):
        log.warning("outlived SIGKILL, stuck in the kernel: %s", [p.pid for p in left])
