"""How often to make a checkpoint, where the spec leaves it open: often enough that a failure costs
little, and seldom enough that the checkpoints do.

Young (1974) and Daly (2006): with a checkpoint that costs C and a failure every M on average, the time
that is lost to both together is least at an interval of sqrt(2 C M).
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from shared.specs import Checkpointing

SHORTEST, LONGEST = 30.0, 3600.0
"""Seconds. Below, checkpoints are mostly overhead of files and rows; above, what is lost hurts however
rarely it is."""
_COPIED_A_SECOND = 1e9
"""Bytes; what is assumed until a checkpoint was measured."""
_STEPS, _CHECKPOINTS = 50, 5
"""How many of the latest are looked at."""
_WORTH_TELLING = 1.5


def choose_interval(cost: float, writing: float, between_failures: float) -> float:
    """Seconds from one checkpoint to the next.

    Args:
        cost: Seconds that training loses by one.
        writing: Seconds until one is durable; the next is not due before.
        between_failures: Seconds from one failure of the gang to the next, on average.
    """
    best = math.sqrt(2 * cost * between_failures)
    return max(min(max(best, SHORTEST), LONGEST), writing)


class Interval:
    """Seconds from one checkpoint to the next, by the spec or by what checkpoints turn out to cost."""

    def __init__(self, rules: Checkpointing, between_failures: float, size: int) -> None:
        """
        Args:
            between_failures: Seconds from one failure of the gang to the next, on average.
            size: Bytes that a rank copies for a checkpoint, about.
        """
        self.automatic = rules.every_seconds == "auto" and rules.every_steps is None
        self.seconds: float | None = None
        self._between_failures = between_failures
        self._told = 0.0
        if self.automatic:
            self.seconds = choose_interval(size / _COPIED_A_SECOND, 0.0, between_failures)
        elif rules.every_seconds != "auto":
            self.seconds = rules.every_seconds

    def measured(self, cost: float, writing: float) -> str | None:
        """What checkpoints cost by now, and until when they are durable, in seconds. Returns what people
        should be told, if the interval is another than they know."""
        if not self.automatic:
            return None
        self.seconds = chosen = choose_interval(cost, writing, self._between_failures)
        if self._told and 1 / _WORTH_TELLING < chosen / self._told < _WORTH_TELLING:
            return None
        self._told = chosen
        return (
            f"a checkpoint costs {cost:.2f} s and is durable after {writing:.2f} s, and a failure is to "
            f"be expected every {duration(self._between_failures)}: one every {duration(chosen)}"
        )


class Cost:
    """What a checkpoint costs: the wait for the copy, and the time by which steps take longer while it
    is written."""

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=_STEPS)
        self._known: deque[float] = deque(maxlen=_CHECKPOINTS)
        self._waited: float | None = None
        self._beside: list[float] = []

    def step(self, seconds: float, *, writing: bool) -> None:
        """A step took so long, with a checkpoint being written beside it or not."""
        if writing:
            self._beside.append(seconds)
        else:
            self._close()
            self._quiet.append(seconds)

    def waited(self, seconds: float) -> None:
        """Training waited so long for the copy of the checkpoint that is written from now on."""
        self._close()
        self._waited = seconds

    @property
    def seconds(self) -> float | None:
        """Of one checkpoint, by the latest of them; None before the first is over."""
        return statistics.median(self._known) if self._known else None

    def _close(self) -> None:
        if self._waited is None:
            return
        # The median, as a step in which something else happened says nothing about the others.
        usual = statistics.median(self._quiet) if self._quiet else math.inf
        longer = sum(took - usual for took in self._beside)
        self._known.append(self._waited + max(0.0, longer))
        self._waited, self._beside = None, []


def duration(seconds: float) -> str:
    """For people: 40 s, 7 min, 2.5 h, 3.0 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
