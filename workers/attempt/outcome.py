"""How a rank's part in an attempt ended, as values; and what an exit that nobody announced means."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.lifecycle import FailureClass
from shared.store.finish import Failure
from workers.tree import Exit


@dataclass(frozen=True, slots=True)
class Finished:
    """The rank did all it had to."""

    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    failure: Failure


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The user cancelled the job."""


@dataclass(frozen=True, slots=True)
class Stale:
    """The attempt was over, or another holds the lease: nothing more of this rank counts."""

    why: str = "the attempt is over"


Outcome = Finished | Failed | Cancelled | Stale


def failed(
    failure_class: FailureClass,
    code: str,
    message: str,
    hint: str | None = None,
    rows_at_once: int | None = None,
) -> Failed:
    return Failed(Failure(failure_class, code, message, hint, rows_at_once))


def classify_exit(
    what: str,
    end: Exit,
    *,
    out_of_memory: bool,
    last_words: str,
    rows_at_once: int | None = None,
) -> Failed:
    """What an exit without a report means. ``what`` is for people: "rank 0", "the engine".
    ``rows_at_once`` is what a training rank holds.

    A rank that knows what went wrong says so before it ends; what is left is a crash, a kill from
    outside, or a defect.
    """
    said = f": {last_words}" if last_words else ""
    if end.lost:
        return failed(
            FailureClass.INFRASTRUCTURE,
            "supervisor_killed",
            f"the supervisor of {what} was killed, and its processes were ended",
        )
    if end.signal is not None:
        if end.signal == signal.SIGKILL and out_of_memory:
            return failed(
                FailureClass.OUT_OF_MEMORY,
                "host_out_of_memory",
                f"the kernel killed {what} because the host ran out of memory",
                "Use a smaller micro_batch_size or max_length, or devices with more memory.",
                rows_at_once,
            )
        name = signal.Signals(end.signal).name
        return failed(
            FailureClass.INFRASTRUCTURE,
            "rank_killed" if end.signal == signal.SIGKILL else "rank_crashed",
            f"{what} was ended by {name}{said}",
            "Its log has the details.",
        )
    if end.exit_code:
        return failed(
            FailureClass.INFRASTRUCTURE,
            "rank_exited",
            f"{what} ended with exit code {end.exit_code}{said}",
            "Its log has the details.",
        )
    return failed(
        FailureClass.INFRASTRUCTURE,
        "rank_ended_early",
        f"{what} ended without saying that it was done{said}",
    )


def last_line(log: Path, limit: int = 300) -> str:
    """The last line of a log that is not empty, for the message of a failure."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:limit] for line in reversed(lines) if line.strip()), "")


class OomWatch:
    """Whether the kernel's out-of-memory killer struck since this was made.

    The counter of our own control group where there is one (cgroup v2), else that of the host.
    """

    def __init__(self) -> None:
        self._before = _oom_kills()

    def struck(self) -> bool:
        return _oom_kills() > self._before


def _oom_kills() -> int:
    try:
        group = next(
            line.rpartition(":")[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        counters = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except (OSError, StopIteration):
        try:
            counters = Path("/proc/vmstat").read_text()
        except OSError:
            return 0
    found = dict(line.split() for line in counters.splitlines() if len(line.split()) == 2)
    return int(found.get("oom_kill", 0))
