"""The processes of a benchmark's stack, as /proc shows them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path


def kill_nursery(host_manager: int) -> None:
    """Afterwards a rank has to wait until torch and transformers are imported again."""
    for pid in _pids():
        if b"workers.ranks.nursery" in _command(pid) and _parent(pid) == host_manager:
            os.kill(pid, signal.SIGKILL)


def ranks_below(folder: Path) -> list[int]:
    """The ranks whose output goes into a file below a job's ``folder``, oldest first."""
    writing = set()
    for pid in _pids():
        try:
            if str(Path(f"/proc/{pid}/fd/1").readlink()).startswith(f"{folder}/"):
                writing.add(pid)
        except OSError:
            continue
    return sorted(pid for pid in writing if _parent(pid) in writing)  # children of supervisors


def children(pid: int) -> list[int]:
    return sorted(each for each in _pids() if _parent(each) == pid)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def tree_cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time of processes and all below them, also of those that are gone and were waited for."""
    seen: set[int] = set()
    waiting = list(pids)
    while waiting:
        if (pid := waiting.pop()) not in seen:
            seen.add(pid)
            waiting += children(pid)
    return sum(map(_cpu_seconds, seen))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
