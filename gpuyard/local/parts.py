"""The parts of the stack as processes that are kept running."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpuyard.local.processes import spawn

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
SETTLED_AFTER = 60.0
"""Seconds; a part that lived so long starts anew without a pause."""


@dataclass(slots=True)
class Part:
    """A process that is started again, after a growing pause, whenever it ends."""

    name: str
    argv: list[str]
    env: Mapping[str, str]
    log: Path
    end_seconds: float
    """What it gets between SIGTERM and SIGKILL."""
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    _started: float = 0.0
    _start_after: float = 0.0
    _pause: float = field(default=FIRST_PAUSE)

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def start(self) -> None:
        self._started = time.monotonic()
        self.process = spawn(self.argv, log=self.log, env=self.env)

    def look_after(self, say: Callable[[str], None]) -> bool:
        """Notice that it ended, or start it when its pause is over. True if it was started anew."""
        now = time.monotonic()
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self.process = None
            if now - self._started > SETTLED_AFTER:
                self._pause = FIRST_PAUSE
            self._start_after = now + self._pause
            say(f"{self.name} {how_it_ended(code)}; starts again in {self._pause:g} s ({self.log})")
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if now < self._start_after:
            return False
        self.restarts += 1
        self.start()
        return True

    def log_tail(self, lines: int = 15) -> str:
        """The end of its log, for people."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 8192))
            found = log.read().decode(errors="replace").splitlines()[-lines:]
        return "\n".join([f"{self.log}:", *found])


def how_it_ended(code: int) -> str:
    """Of a process, by its return code."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
