"""Ranks that are slow at their own part of the steps, and what the gang pays for it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

WINDOW = 50
"""Steps that are looked at together."""
_SLOW, _SLOW_NO_MORE = 1.5, 1.25
"""Times the median of the gang."""


@dataclass(frozen=True, slots=True)
class Straggler:
    rank: int
    times: float
    """So many times the median of the gang it takes for its part."""
    wait: float
    """The share of a step in which all others wait for it."""


class Stragglers:
    """What it finds follows from the last steps alone. A rank is named once, until it has kept up for a
    while. Steps with a partial batch are to be left out: ranks have unequal parts in them."""

    def __init__(self, *, least_seconds: float) -> None:
        """``least_seconds``: steps are looked at over so long, at least."""
        self._least_seconds = least_seconds
        self._steps: deque[tuple[Sequence[float], float]] = deque()
        self._named: set[int] = set()

    def add(self, own: Sequence[float], seconds: float) -> list[Straggler]:
        """A step of ``seconds``, in which each rank took ``own`` for its part; who is slow since now."""
        self._steps.append((own, seconds))
        lasted = sum(seconds for _, seconds in self._steps)
        if len(self._steps) < WINDOW or lasted < self._least_seconds:
            return []
        found = [self._judge(rank) for rank in range(len(own))]
        while len(self._steps) >= WINDOW and lasted >= self._least_seconds:
            lasted -= self._steps.popleft()[1]
        slow = [each for each in found if each.times > _SLOW and each.rank not in self._named]
        self._named |= {each.rank for each in slow}
        self._named -= {each.rank for each in found if each.times < _SLOW_NO_MORE}
        return slow

    def _judge(self, rank: int) -> Straggler:
        times, waits = [], []
        for own, seconds in self._steps:
            # Of two ranks the faster one says what is usual.
            times.append(own[rank] / max(1e-9, median_low(own)))
            others = max(each for other, each in enumerate(own) if other != rank)
            waits.append(max(0.0, own[rank] - others) / max(1e-9, seconds))
        # Single steps say nothing: texts differ in length, and hosts have other things to do.
        return Straggler(rank, median(times), median(waits))
