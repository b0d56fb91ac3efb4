"""Ranks that are slow at their own part of the steps, and what the gang pays for it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 50
"""Steps that are looked at together."""
_LOOKS = 5
"""At each step, while the window fills anew."""
_SLOW, _SLOW_NO_MORE = 1.5, 1.25
"""Times the median of the gang."""


@dataclass(frozen=True, slots=True)
class _Step:
    seconds: float
    times: NDArray[np.float64]
    """Of each rank: so many times what is usual in the gang it took."""
    waits: NDArray[np.float64]
    """Of each rank: the share of the step in which all others waited for it."""


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
        self._steps: deque[_Step] = deque()
        self._lasted = 0.0
        self._new = 0
        self._named: set[int] = set()

    def add(self, own: Sequence[float], seconds: float) -> list[Straggler]:
        """A step of ``seconds``, in which each rank took ``own`` for its part; who is slow since now."""
        self._steps.append(_step(np.asarray(own), seconds))
        self._lasted += seconds
        self._new += 1
        while len(self._steps) > WINDOW:
            shorter = self._lasted - self._steps[0].seconds
            if shorter < self._least_seconds:
                break
            self._lasted = shorter
            self._steps.popleft()
        full = len(self._steps) >= WINDOW and self._lasted >= self._least_seconds
        # Not with each step: with many short ones that would take longer than they do.
        if not full or self._new * _LOOKS < len(self._steps):
            return []
        self._new = 0
        # Medians, as single steps say nothing: texts differ in length, and hosts have other things to do.
        times = np.median([step.times for step in self._steps], axis=0)
        slow = {int(rank) for rank in np.flatnonzero(times > _SLOW)}
        found = sorted(slow - self._named)
        self._named = slow | {rank for rank in self._named if times[rank] >= _SLOW_NO_MORE}
        return [
            Straggler(
                rank, float(times[rank]), float(np.median([s.waits[rank] for s in self._steps]))
            )
            for rank in found
        ]


def _step(own: NDArray[np.float64], seconds: float) -> _Step:
    # Of two ranks the faster one says what is usual.
    usual = np.sort(own)[(len(own) - 1) // 2]
    second, first = np.sort(own)[-2:]
    waits = np.where(own == first, first - second, 0.0) / max(1e-9, seconds)
    return _Step(seconds, own / max(1e-9, usual), waits)
