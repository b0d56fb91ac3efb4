"""What a rank is doing right now, noted by the training itself and read by its watch.

A note is one tuple that is put in place of the one before: nothing is locked, and it costs no more than
reading the clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Protocol

_REMEMBERED = 64


class Moment(Protocol):
    """A place in the work of a device, which may lag behind the process."""

    def reached(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class State:
    """``since`` is a time of ``time.monotonic``."""

    step: int
    in_step: bool
    """Or between two steps: an evaluation, a checkpoint."""
    waiting: bool
    """For the other ranks. Else it is at work of its own."""
    since: float
    own_work: Moment | None = None
    """Where it waits: what its device has to reach first."""


class Pulse:
    """Of one rank. Written by the thread that trains, read by any."""

    def __init__(self) -> None:
        self.state = State(0, in_step=False, waiting=False, since=time.monotonic())
        self._began = 0.0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def begin_step(self, step: int) -> None:
        """``step`` counts from 0."""
        self._began = time.monotonic()
        self.state = State(step, in_step=True, waiting=False, since=self._began)

    def end_step(self) -> None:
        now = time.monotonic()
        self._seconds.append(now - self._began)
        self.state = State(self.state.step + 1, in_step=False, waiting=False, since=now)

    def wait(self, own_work: Moment | None = None) -> None:
        """From here on the rank waits for the others, once its device has got to ``own_work``."""
        before = self.state
        if not before.waiting:
            now = time.monotonic()
            self.state = State(before.step, before.in_step, True, now, own_work)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what all ranks do together."""
        self.wait()
        yield
        before = self.state
        self.state = State(before.step, before.in_step, waiting=False, since=time.monotonic())

    @property
    def median_step(self) -> float | None:
        """Seconds, of the last steps; None while they are too few to say."""
        known = list(self._seconds)
        return median(known) if len(known) >= 3 else None
