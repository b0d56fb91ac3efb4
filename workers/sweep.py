"""Finding and ending processes by what ``/proc`` says about them. Standard library only.

Three nets, each for the case that the one before it was killed:

1. the *attempt supervisor* (``workers/tree.py``) is a subreaper and ends all its descendants;
2. the *nursery* and the *host manager* are subreapers too: what loses its supervisor becomes their
   direct child, and ``reap_orphans`` ends it;
3. ``sweep`` ends whatever carries the tag of this host in its environment; the host manager calls
   it before it starts anything.

A pid alone names nothing for long: where time passes between finding and killing, a process is
named by ``ProcessId``, its pid together with its start time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_CHILDREN_FILES = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists()
"""Linux with CONFIG_PROC_CHILDREN, as distributions build it; some sandboxes lack it."""

TREE_VARIABLE = "GPUYARD_TREE"
"""The environment variable that ``sweep`` looks for: set by the host manager, inherited by all."""

SUPERVISOR_NAME = "gpuyard-attempt"
"""What an attempt supervisor calls itself (``/proc/PID/comm``, 15 bytes at most)."""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What ``/proc/PID/stat`` says: see ``man 5 proc_pid_stat``. ``started`` is in clock ticks."""

    pid: int
    name: str
    state: str
    parent: int
    group: int
    session: int
    threads: int
    started: int

    @property
    def lives(self) -> bool:
        """False for a zombie, which holds neither memory nor devices. A main thread that is a
        zombie while other threads of the process still run counts as living."""
        return self.state not in "ZX" or self.threads > 1

    @property
    def is_supervisor(self) -> bool:
        """An attempt supervisor: it ends its own tree and is never an orphan. Ranks inherit its
        name for an instant, but not that it leads its session."""
        return self.name == SUPERVISOR_NAME and self.session == self.pid


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """None when there is no such process."""
        stat = read_stat(pid)
        return None if stat is None else cls(pid, stat.started)

    def lives(self) -> bool:
        stat = read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.lives

    def kill(self) -> bool:
        """SIGKILL; False when it is gone already (or is not ours to kill)."""
        return self.lives() and _kill(self.pid)


def read_stat(pid: int) -> ProcessStat | None:
    """None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name is in parentheses and may itself contain any character, parentheses included.
    start, end = text.index("("), text.rindex(")")
    fields = text[end + 2 :].split()
    return ProcessStat(
        pid=pid,
        name=text[start + 1 : end],
        state=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        threads=int(fields[17]),
        started=int(fields[19]),
    )


def children(pid: int) -> list[int]:
    """The direct children, dead ones that nobody has waited for included."""
    if not _CHILDREN_FILES:
        return [stat.pid for stat in map(read_stat, _all_pids()) if stat and stat.parent == pid]
    # One read a thread: fast enough to catch a process that forks and exits without end.
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process is gone
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # or just this thread
                found += map(int, (thread / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, parents before their children. A snapshot: they may fork on."""
    found = children(pid)
    for child in found:  # grows while it is walked
        found.extend(children(child))
    return found


def kill_trees(roots: Iterable[ProcessId], limit: float) -> list[ProcessId]:
    """SIGKILL these processes and everything below them until none lives.

    Works from outside of the tree: descendants are found before their parent dies and leaves them
    to a subreaper. Returns what still lives after ``limit`` seconds (stuck in the kernel).
    """
    known = set(roots)

    def find() -> set[ProcessId]:
        living = {process for process in known if process.lives()}
        below = {ProcessId.of(pid) for process in living for pid in descendants(process.pid)}
        known.update(process for process in below if process is not None)
        return {process for process in known if process.lives()}

    return _kill_until_none(find, limit)[1]


def orphans(known: Collection[int]) -> list[int]:
    """Direct children of this process that are neither ``known`` nor attempt supervisors.

    They are there because this process is a subreaper and their own parent was killed.
    """
    found = (read_stat(pid) for pid in children(os.getpid()) if pid not in known)
    return [stat.pid for stat in found if stat is not None and not stat.is_supervisor]


def reap_orphans(known: Collection[int], limit: float = 5.0) -> int:
    """End the trees of all ``orphans`` and wait for the dead, so that no zombie stays.

    For a subreaper: to be called at every SIGCHLD, and now and then. ``known`` are the pids that
    the caller started and waits for itself. A supervisor that lost its nursery is left to do its
    work, and is reaped here once it is done.

    Returns how many processes were killed. What still lives after ``limit`` seconds is logged.
    """
    me = os.getpid()

    def find() -> set[ProcessId]:
        strangers = [pid for pid in children(me) if pid not in known]
        _reap(strangers)
        found: set[ProcessId] = set()
        for pid in orphans(known):
            tree = (read_stat(member) for member in [pid, *descendants(pid)])
            found |= {ProcessId(stat.pid, stat.started) for stat in tree if stat and stat.lives}
        return found

    killed, left = _kill_until_none(find, limit)
    _reap([pid for pid in children(me) if pid not in known])
    if left:
        log.error("orphans outlived SIGKILL for %g s: pids %s", limit, _pids(left))
    return killed


def sweep(tag: str, *, exclude: Collection[int] = (), limit: float = 30.0) -> int:
    """End every process of this host that carries ``GPUYARD_TREE=tag``, and everything below it.

    For the start of the host manager, when all that should have cleaned up may have been killed.
    The calling process, its ancestors and ``exclude`` are spared.

    Returns how many processes were killed. What still lives after ``limit`` seconds is logged: it
    is stuck in the kernel, most likely in a device driver.
    """
    spared = {*exclude, *_ancestors(os.getpid())}

    def find() -> set[ProcessId]:
        tagged = [pid for pid in _all_pids() if pid not in spared and _carries(pid, tag)]
        below = [child for pid in tagged for child in descendants(pid) if child not in spared]
        stats = (read_stat(pid) for pid in {*tagged, *below})
        return {ProcessId(stat.pid, stat.started) for stat in stats if stat and stat.lives}

    killed, left = _kill_until_none(find, limit)
    if left:
        log.error("processes of an earlier run outlived SIGKILL for %g s: %s", limit, _pids(left))
    return killed


def _kill_until_none(
    find: Callable[[], set[ProcessId]], limit: float
) -> tuple[int, list[ProcessId]]:
    """Kill what ``find`` finds until it finds nothing; how many were killed, and what is left."""
    killed: set[ProcessId] = set()
    seen: set[ProcessId] = set()
    deadline = time.monotonic() + limit
    # A dying process loses its environment, by which it was found, before its files and devices.
    while targets := find() | {target for target in killed if target.lives()}:
        # A process that forks while it is being killed shows up in the next round: rounds with
        # something new follow one another at once, the others leave the dying time to die.
        fresh = targets - seen
        seen |= targets
        killed |= {target for target in targets if target.kill()}
        if time.monotonic() > deadline:
            return len(killed), sorted(targets, key=lambda target: target.pid)
        if not fresh:
            time.sleep(0.005)
    return len(killed), []


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _reap(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _ancestors(pid: int) -> Iterable[int]:
    while pid > 0:
        yield pid
        stat = read_stat(pid)
        pid = stat.parent if stat else 0


def _carries(pid: int, tag: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return False
    return f"{TREE_VARIABLE}={tag}".encode() in environment.split(b"\0")


def _pids(processes: Iterable[ProcessId]) -> str:
    return ", ".join(str(process.pid) for process in processes)
