"""A gradient that runs away, seen before the loss is no number any more. Pure."""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED, _KNOWN = 100, 20
"""Norms that say what is usual; fewer than the second say nothing."""
_TIMES, _IN_A_ROW = 10.0, 5
_GROWTH, _GROWING = 1.5, 8
_CALM = 3.0


class NormWatch:
    """Takes the norm of each step, which all ranks agree on, and finds the same on all of them. What it
    finds follows from the last norms alone."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=_REMEMBERED)
        self._high: list[float] = []
        self._growing: list[float] = []
        self.since: int | None = None
        """The step with which the gradient began to run away; None: it does not."""
        self.usual = 0.0
        """The median of the norms before."""

    def add(self, step: int, norm: float) -> bool:
        """Whether ``norm``, that of ``step``, shows for the first time that the gradient runs away:
        norms of many times the usual in a row, or ever larger ones."""
        known = len(self._usual) >= _KNOWN
        usual = median(self._usual) if known else norm
        if self.since is not None:
            if norm < _CALM * self.usual:
                self.since = None
                self._high, self._growing = [], [norm]
            return False
        self._growing = [*self._growing, norm] if self._grows(norm) else [norm]
        if known and norm > _TIMES * usual:
            self._high.append(norm)
        else:
            # Those that are far too high do not become the usual, or a slow end would go unseen.
            self._usual.extend([*self._high, norm])
            self._high = []
        steps = max(
            len(self._high) if len(self._high) >= _IN_A_ROW else 0,
            len(self._growing) if len(self._growing) > _GROWING else 0,
        )
        if not steps:
            return False
        self.since = step - steps + 1
        self.usual = usual if known else self._growing[0]
        return True

    def _grows(self, norm: float) -> bool:
        return bool(self._growing) and norm > 0 and norm >= _GROWTH * self._growing[-1]
