"""Processes as /proc shows them: which belong to a job, which to a stack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def alive(pid: int) -> str | None:
    """The command line of a process that runs; None for one that is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rsplit(")", 1)[1].split()[0] in ("Z", "X"):
            return None
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() or stat
    except (OSError, IndexError):
        return None


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None


def environment_of(pid: int) -> dict[str, str]:
    data = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(item.split("=", 1) for item in data.split("\0") if "=" in item)


def writing_below(folder: Path) -> set[int]:
    """Live processes whose standard output is a file below ``folder``."""
    found = set()
    for pid in pids():
        try:
            target = str(Path(f"/proc/{pid}/fd/1").readlink())
        except OSError:
            continue
        if target.startswith(f"{folder}/") and alive(pid):
            found.add(pid)
    return found


def processes_of_job(data: Path, job_id: str) -> set[int]:
    """Supervisors and ranks of a training job: what they print goes into the job's folder."""
    return writing_below(data / "jobs" / job_id)


def ranks_of_job(data: Path, job_id: str) -> list[int]:
    """Only the ranks: children of an attempt supervisor."""
    found = processes_of_job(data, job_id)
    return sorted(pid for pid in found if parent_of(pid) in found)


def started_by_stack(data: Path) -> list[int]:
    """Live processes, other than this one and its ancestors, that name the data folder in their
    environment or command line."""
    spared = {os.getpid()}
    parent = parent_of(os.getpid())
    while parent:
        spared.add(parent)
        parent = parent_of(parent)
    found = []
    for pid in pids():
        if pid in spared or not (command := alive(pid)):
            continue
        try:
            named = str(data) in command or str(data) in environment_of(pid).get("GPUYARD_DATA", "")
        except OSError:
            named = False
        if named:
            found.append(pid)
    return found
