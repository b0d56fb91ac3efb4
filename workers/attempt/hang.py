"""Whether an engine hangs: it is alive, is wanted for something, and gets nowhere. Pure: the clock is the
caller's.

An engine tells what it does and since when, by a thread of its own (``workers/ranks/engine/signs.py``).
Whatever else it reports, it reports between two steps, so that is progress. Silence is none: the time since
the last progress runs on.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.lifecycle import FailureClass
from shared.messages import Alive, EngineWork, Report
from workers.attempt.outcome import Failed, failed

LOADING = 3
"""Loading a model may take so many times as long as a step: it may come over a network."""
_WORDS: dict[EngineWork | None, str] = {
    "loading": "loaded a model",
    "reading": "read its rows",
    "computing": "computed one step",
    None: "said nothing",
}


@dataclass(frozen=True, slots=True)
class Hung:
    """What the engine did when it got nowhere any more, and for how long."""

    work: EngineWork | None
    seconds: float

    def failure(self) -> Failed:
        """As the end of an engine that may be due to its rows."""
        return failed(
            FailureClass.INFRASTRUCTURE,
            "engine_hung",
            f"the engine hung: for {self.seconds:.0f} s it {_WORDS[self.work]}, and was ended",
            "If a step may take so long, raise GPUYARD_ENGINE_HANG (seconds; 0 switches this off).",
        )


class HangWatch:
    """Of one engine, by the one who reads what it reports.

    Args:
        limit: seconds that a step may take; 0: any time.
        now: as of ``time.monotonic``, here and everywhere below.
    """

    def __init__(self, limit: float, now: float) -> None:
        self._limit = limit
        self._since = now
        self._work: EngineWork | None = None

    def hear(self, report: Report, now: float) -> None:
        """A report of the engine, when it was read. Those that were read late are late signs."""
        if isinstance(report, Alive):
            self._work, self._since = report.work, now - report.seconds
        else:
            self._work, self._since = None, now

    def excuse(self, now: float) -> None:
        """Nothing is wanted of the engine, or nobody reads what it says: time runs from now on."""
        self._work, self._since = None, now

    def judge(self, now: float) -> Hung | None:
        """The engine is wanted for something. Whether it hangs."""
        seconds = now - self._since
        if not self._limit or seconds <= self._patience:
            return None
        return Hung(self._work, seconds)

    def due_in(self, now: float) -> float | None:
        """Seconds until ``judge`` may say so, if nothing comes; None: it never does."""
        return max(0.0, self._since + self._patience - now) if self._limit else None

    @property
    def _patience(self) -> float:
        return self._limit * (LOADING if self._work == "loading" else 1)
