"""How fast an attempt goes, for people."""

from __future__ import annotations

import time
from collections import deque

from shared.messages import Progress

INTERVAL = 0.3
"""Seconds between two reports of progress, at least."""

WINDOW = 10.0
"""Rates are means over the last so many seconds of computing."""


class Pace:
    """Counts rows and tokens; says when progress is due and what it is."""

    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0
        self._marks: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])
        self._reported_at = float("-inf")
        self._reported = (0, 0)

    def count(self, rows: int, tokens: int) -> None:
        now = time.monotonic()
        self.rows += rows
        self.tokens += tokens
        if now - self._marks[-1][0] >= 0.1:
            self._marks.append((now, self.rows, self.tokens))
            while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW:
                self._marks.popleft()

    def rates(self) -> tuple[float, float]:
        """Rows and tokens per second, lately."""
        then, rows, tokens = self._marks[0]
        seconds = max(time.monotonic() - then, 1e-6)
        return (self.rows - rows) / seconds, (self.tokens - tokens) / seconds

    def due_in(self) -> float | None:
        """Seconds until there is progress to report (0: now); None while there is nothing new."""
        if self._reported == (self.rows, self.tokens):
            return None
        return max(0.0, self._reported_at + INTERVAL - time.monotonic())

    def report(self, attempt_id: str, total_rows: int) -> Progress:
        self._reported_at, self._reported = time.monotonic(), (self.rows, self.tokens)
        rows_per_second, tokens_per_second = self.rates()
        return Progress(
            attempt_id=attempt_id,
            step=self.rows,
            total_steps=total_rows,
            examples_per_second=round(rows_per_second, 2),
            tokens_per_second=round(tokens_per_second, 1),
        )
