"""How far a batch job is, told by each of its ranks for all of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from shared.messages import Progress

EVERY = 1.0
"""Seconds between two looks at what the whole job has, at least."""
SHARE = 0.02
"""Of the time, that these looks may take: they read all shards."""
WINDOW = 10.0
"""Rates are means over the last so many seconds."""


class JobProgress:
    """Of the whole job: what its ranks have committed, and what this one has computed besides.

    ``read`` gives ``row_totals``, or None while Postgres is away.
    """

    def __init__(
        self,
        totals: dict[str, int],
        read: Callable[[], dict[str, int] | None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._now = now
        self._start = self._latest = totals
        self._own_rows = self._own_errors = self._rows_before = 0
        self._look_at = now() + EVERY
        self._marks = deque([self._mark(totals)])

    @property
    def errors(self) -> int:
        """Rows with errors, as far as is known."""
        return max(self._start["errors"] + self._own_errors, self._latest["errors"])

    def count(self, rows: int, errors: int) -> None:
        """This rank computed so many."""
        self._own_rows += rows
        self._own_errors += errors

    def begin(self) -> None:
        """A fresh engine counts from 0."""
        self._rows_before = self._own_rows

    def look(self) -> bool:
        """Read what the whole job has; False: Postgres is away."""
        began = self._now()
        totals = self._read()
        took = self._now() - began
        self._look_at = self._now() + max(EVERY, took / SHARE)
        if totals is None:
            return False
        self._latest = totals
        self._marks.append(self._mark(totals))
        while len(self._marks) > 2 and self._now() - self._marks[0][0] > WINDOW:
            self._marks.popleft()
        return True

    def of_job(self, report: Progress) -> Progress:
        """What the engine says of its own rows as that of the job."""
        if self._now() >= self._look_at:
            self.look()
        own = self._start["done"] + self._rows_before + report.step
        rows = self._latest["rows"]
        told: dict[str, float] = {
            "step": min(max(own, self._latest["done"]), rows),
            "total_steps": rows,
        }
        (then, done, tokens), (now, done_now, tokens_now) = self._marks[0], self._marks[-1]
        if self._latest["done"] - self._start["done"] > self._own_rows and now > then:
            # Others compute, too.
            told["examples_per_second"] = round((done_now - done) / (now - then), 2)
            told["tokens_per_second"] = round((tokens_now - tokens) / (now - then), 1)
        return report.model_copy(update=told)

    def _mark(self, totals: dict[str, int]) -> tuple[float, int, int]:
        return self._now(), totals["done"], totals["input_tokens"] + totals["output_tokens"]
