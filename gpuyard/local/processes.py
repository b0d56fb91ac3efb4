"""Child processes of the local stack: they end with their parent, and left-overs are found again.

A process is known by its id *and* its start time, since ids are used again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STACK_TAG = "GPUYARD_STACK"
"""Environment variable that marks every process of a stack, grandchildren included, with the data
folder it serves, so that the next start finds what a killed one left behind."""

_LOG_LIMIT = 10 * 1024**2


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    started: int
    """Clock ticks since boot, field 22 of ``/proc/PID/stat``."""

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a process that lives now; None for a zombie or none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def send(self, number: int) -> None:
        """Signal it, unless it is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    cwd: Path | None = None,
    death_signal: int = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, its output appended to ``log``.

    The child gets ``death_signal`` when this process dies, however it dies. The kernel ties that to
    the *thread* that started the child, so a child started by another than the main thread goes
    without: it would be ended with the thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        log.replace(log.with_name(log.name + ".1"))
    command = list(argv)
    if threading.current_thread() is threading.main_thread():
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("deathsig.py"))]
        command = [*launcher, str(int(death_signal)), str(os.getpid()), *command]
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], steps: Sequence[tuple[int, float]]) -> bool:
    """Send each signal in turn and wait its seconds; SIGKILL after the last.

    Returns whether a signal other than SIGKILL was enough.
    """
    for number, seconds in steps:
        if process.poll() is not None:
            return True
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return True
    process.kill()
    process.wait()
    return False


def end_strangers(
    processes: Sequence[ProcessId], steps: Sequence[tuple[int, float]]
) -> list[ProcessId]:
    """The same for processes that are not our children. Returns who had to be killed."""
    left = list(processes)
    for number, seconds in steps:
        for process in left:
            process.send(number)
        wait_until(lambda: not any(p.alive() for p in processes), seconds)
        left = [p for p in left if p.alive()]
    for process in left:
        process.send(signal.SIGKILL)
    wait_until(lambda: not any(p.alive() for p in processes), 5)
    return left


def wait_until(predicate: Callable[[], bool], seconds: float) -> bool:
    """Poll until ``predicate()``; False after so many seconds."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def command_line(pid: int) -> list[str]:
    """The arguments of a process; empty if it is gone. Readable across users, unlike its folder."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _all_pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            yield int(entry.name)


def find_by_arguments(program: str, argument: str) -> list[ProcessId]:
    """Processes of the program with this file name that have ``argument`` as one of theirs."""
    found = []
    for pid in _all_pids():
        line = command_line(pid)
        if line and Path(line[0]).name == program and argument in line[1:]:
            identity = ProcessId.of(pid)
            if identity is not None:
                found.append(identity)
    return found


def find_by_tag(data: Path) -> list[ProcessId]:
    """Processes that carry the tag of the stack on ``data``, this one aside."""
    tag = f"{STACK_TAG}={data}".encode()
    found = []
    for pid in _all_pids():
        with contextlib.suppress(OSError):
            if tag in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                identity = ProcessId.of(pid)
                if identity is not None:
                    found.append(identity)
    return found
