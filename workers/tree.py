"""The attempt supervisor: runs one rank and always ends its whole process tree.

One small process per rank, forked from the nursery. Standard library only. In the order of its
life (``run_attempt``): it leads a session of its own, becomes a *child subreaper* so that no
descendant can leave its tree, opens the log, forks the rank, says so, and then waits for whichever
comes first:

- the rank exits by itself;
- the worker orders ``end <grace seconds>``, or is gone (EOF on the control socket);
- SIGTERM, which counts as the worker being gone.

In all but the first case the rank gets SIGTERM and the grace to act on it. Then everything that is
left below the supervisor gets SIGKILL until nothing is, and the supervisor reports and exits.

Control socket, lines of JSON towards the worker: one ``{"supervisor": [pid, start], "rank": [pid,
start]}`` (or ``{"failed": why}``), then one ``{"exit_code", "signal", "swept"}``. From the worker:
``end <seconds>``. EOF without the second line: the supervisor was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from workers.sweep import SUPERVISOR_NAME, ProcessId, descendants, read_stat

RANK_NAME = "gpuyard-rank"
"""What a rank calls itself (``/proc/PID/comm``)."""

HELD_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
"""Blocked around every fork, so that none is lost between two processes' handlers."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank ended: with an exit code, or by a signal, or unknown when its supervisor vanished.

    ``swept`` counts the processes that the rank left behind and that were killed after it.
    """

    exit_code: int | None
    signal: int | None
    swept: int = 0
    lost: bool = False
    """The supervisor was killed before it could report; neither code nor signal is known."""


@dataclass(frozen=True, slots=True)
class AttemptRequest:
    """What a supervisor needs to know, beside its two sockets."""

    rank_main: Callable[[socket.socket], int | None]
    """Runs in the rank with the channel's socket; its value is the exit code (None: 0)."""
    log_path: Path
    """stdout and stderr of the whole tree are appended here."""
    abandoned_grace: float
    """Seconds between SIGTERM and SIGKILL when the worker is gone and cannot say."""


def run_attempt(
    request: AttemptRequest, *, control: socket.socket, channel: socket.socket
) -> NoReturn:
    """Be the attempt supervisor. To be called in a fresh fork with ``HELD_SIGNALS`` blocked.

    Both sockets must be held by no other process of this side.
    """
    code = 1
    try:
        os.setsid()
        set_process_name(SUPERVISOR_NAME)
        become_subreaper()
        try:
            _send_output_to(request.log_path)
        except OSError as error:
            _tell(control, {"failed": f"cannot write the log {request.log_path}: {error.strerror}"})
            os._exit(1)
        with SignalWatch(signal.SIGCHLD, signal.SIGTERM) as watch:
            supervisor = os.getpid()
            rank = os.fork()
            if rank == 0:
                watch.close()
                control.close()
                _be_rank(supervisor, request.rank_main, channel)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
            # Only the rank and the worker hold the channel, so that each sees the other go.
            channel.close()
            ids = {"supervisor": ProcessId.of(supervisor), "rank": ProcessId.of(rank)}
            _tell(control, {k: [v.pid, v.started] for k, v in ids.items() if v is not None})
            end = _Attempt(rank, control, watch, request.abandoned_grace).watch_over()
            _tell(control, {"exit_code": end.exit_code, "signal": end.signal, "swept": end.swept})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Never back into the code of the nursery that this process was forked from.
        os._exit(code)


class _Attempt:
    """A running rank as its supervisor sees it."""

    def __init__(
        self, rank: int, control: socket.socket, watch: SignalWatch, abandoned_grace: float
    ) -> None:
        self._rank = rank
        self._control = control
        self._watch = watch
        self._abandoned_grace = abandoned_grace
        self._status: int | None = None
        self._deadline: float | None = None
        self._orders = b""

    def watch_over(self) -> Exit:
        """Wait for the end of the rank, or for the order to end it; then leave nothing alive."""
        self._wait_for_end()
        swept = self._kill_everything()
        assert self._status is not None  # noqa: S101 - nothing is left, so the rank was reaped
        code = os.waitstatus_to_exitcode(self._status)
        return Exit(code if code >= 0 else None, -code if code < 0 else None, swept)

    def _wait_for_end(self) -> None:
        poll = select.poll()
        poll.register(self._watch.fileno(), select.POLLIN)
        poll.register(self._control.fileno(), select.POLLIN)
        while True:
            self._reap()
            if self._status is not None:
                return
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            ready = {fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)}
            if self._watch.fileno() in ready and signal.SIGTERM in self._watch.take():
                self._order_end(self._abandoned_grace)
            if self._control.fileno() in ready and not self._take_orders():
                poll.unregister(self._control.fileno())
                self._order_end(self._abandoned_grace)

    def _take_orders(self) -> bool:
        """Read what the worker says; False when it is gone."""
        try:
            data = self._control.recv(4096)
        except ConnectionError:
            return False
        *orders, self._orders = (self._orders + data).split(b"\n")
        for order in orders:
            self._order_end(float(order.removeprefix(b"end ")))
        return bool(data)

    def _order_end(self, grace: float) -> None:
        """SIGTERM to the rank, at the first order only; later ones can only shorten the grace."""
        deadline = time.monotonic() + grace
        if self._deadline is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rank, signal.SIGTERM)
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)

    def _kill_everything(self) -> int:
        """SIGKILL all descendants until none is left; how many of those were not the rank.

        A subreaper with no child has no descendant: every living process has its chain of living
        parents, and all chains below this process end here. So ECHILD is the proof, and it cannot
        be raced by forks as a listing of ``/proc`` can.
        """
        killed, pause = 0, 0.001
        while True:
            some_left, reaped = self._reap()
            killed += reaped
            if not some_left:
                return killed
            for pid in descendants(os.getpid()):
                # First the process itself, at once: one that forks and exits without end is gone a
                # moment later. Then its group, which fork cannot outrun, as the kernel ends it in
                # one piece. No group is shared with outsiders: the rank began its own session.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                stat = read_stat(pid)
                if stat is not None and stat.group not in (0, os.getpgrp()):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(stat.group, signal.SIGKILL)
            # At once while there is progress; the stuck ones are not worth a busy loop.
            if reaped:
                pause = 0.001
            else:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _reap(self) -> tuple[bool, int]:
        """Wait for the dead: is any child left, and how many but the rank died by SIGKILL."""
        killed = 0
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False, killed
            if pid == 0:
                return True, killed
            if pid == self._rank:
                self._status = status
            elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                killed += 1


def _be_rank(
    supervisor: int, rank_main: Callable[[socket.socket], int | None], channel: socket.socket
) -> NoReturn:
    """Be the rank: what ``rank_main`` returns is the exit code, what it raises goes to the log."""
    code = 1
    try:
        set_process_name(RANK_NAME)
        os.setsid()
        die_with_parent(supervisor)
        for number in HELD_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        _prefer_for_oom()
        code = rank_main(channel) or 0
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # No interpreter shutdown: it would run the nursery's, and joins threads that may hang.
        os._exit(code & 0xFF)


class SignalWatch:
    """Turns signals into bytes on a pipe, so that ``poll`` can wait for them and none is missed.

    From the main thread only; one at a time in a process.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._previous = {number: signal.getsignal(number) for number in signals}
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        return self._read

    def take(self) -> set[int]:
        """The numbers of the signals that came since the last call."""
        try:
            return set(os.read(self._read, 1 << 16))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> SignalWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def become_subreaper() -> None:
    """Descendants whose parent dies become children of this process from now on."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Get ``number`` when the parent ends; end at once when ``parent`` already has.

    To the kernel the parent is the *thread* that forked: sound only where that was the parent's
    main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    # The parent may have died before the call, and nobody would ever send the signal.
    if os.getppid() != parent:
        os._exit(1)


def set_process_name(name: str) -> None:
    """What ``ps`` and ``top`` show; 15 bytes at most."""
    Path("/proc/self/comm").write_text(name)


@contextlib.contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """An address to bind or connect a Unix socket at ``path``, however long the path is.

    ``sun_path`` holds 107 bytes; a name below ``/proc/self/fd/<folder>`` always fits.

    Raises:
        OSError: the folder does not exist.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _send_output_to(log_path: Path) -> None:
    """stdout and stderr to the end of the log, line by line; nothing to read on stdin."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # both are files here


def _prefer_for_oom() -> None:
    """When the host runs out of memory, the kernel should take the rank, not its supervisors."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _tell(control: socket.socket, line: dict[str, object]) -> None:
    # The worker may be gone: then nobody needs to know.
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(line).encode() + b"\n")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
