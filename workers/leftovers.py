"""Ending what an earlier life of a device's worker process left running.

A worker that was killed leaves supervisors that notice it and end their ranks within seconds. Its
successor does not wait for that: before it registers, which frees what was held, it ends them.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from workers.attempt.folders import log_suffix
from workers.sweep import ProcessId, kill_trees, read_stat

log = logging.getLogger(__name__)


def end_left_overs(data: Path, device_id: str, limit: float = 30.0) -> int:
    """End the ranks and the engine of a device; how many supervised trees there were.

    They are known by the log that their supervisors write to, so nothing had to be noted anywhere
    before they were started.
    """
    ended, deadline = 0, time.monotonic() + limit
    while found := _supervisors(data.resolve(), log_suffix(device_id)):
        log.warning("ending %d process trees that an earlier worker left", len(found))
        ended += len(found)
        stuck = kill_trees(found, limit=5.0)
        if stuck and time.monotonic() > deadline:
            log.error("outlived SIGKILL: pids %s", [process.pid for process in stuck])
            break
    return ended


def _supervisors(data: Path, suffix: str) -> list[ProcessId]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        stat = read_stat(int(entry.name))
        if stat is None or not stat.is_supervisor or not stat.lives:
            continue
        try:
            log_path = Path(str((entry / "fd" / "1").readlink()).removesuffix(" (deleted)"))
        except OSError:  # gone, or another user's
            continue
        if log_path.name.endswith(suffix) and log_path.is_relative_to(data):
            found.append(ProcessId(stat.pid, stat.started))
    return found
