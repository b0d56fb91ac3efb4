"""What others tell a running attempt, and how they wake it."""

from __future__ import annotations

import os
import threading

from shared.messages import Preempt
from workers.attempt.outcome import Outcome


class Inbox:
    """Filled by the lease keeper, the reporter, the drain and cancels; read by the attempt's thread.

    ``fileno`` becomes readable with each change, so that one ``poll`` waits for processes and
    colleagues alike.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self._end: Outcome | None = None
        self._rendezvous: str | None = None
        self._preempt: Preempt | None = None
        self._leaving = False

    @property
    def end(self) -> Outcome | None:
        """How the attempt shall end, as soon as it must."""
        return self._end

    @property
    def rendezvous(self) -> str | None:
        """Where rank 0 listens, once every rank is claimed."""
        return self._rendezvous

    def end_with(self, outcome: Outcome) -> None:
        """Have the attempt end. The first to ask decides how: every end is guarded in the store, so
        one that came too late changes nothing there."""
        with self._lock:
            if self._end is None:
                self._end = outcome
        self.ring()

    def join(self, address: str) -> None:
        if self._rendezvous != address:
            self._rendezvous = address
            self.ring()

    @property
    def preempt(self) -> Preempt | None:
        """The device is wanted back: what a training is told."""
        return self._preempt

    def ask_back(self, reason: str, seconds: float) -> None:
        """Have a training leave in good order, within so many seconds."""
        if self._preempt is None:
            self._preempt = Preempt(reason=reason, seconds=seconds)
            self.ring()

    @property
    def leaving(self) -> bool:
        """Whether a rank of a batch job is to leave with what it computes now, as others go on."""
        return self._leaving

    def leave(self, leaving: bool = True) -> None:
        if self._leaving != leaving:
            self._leaving = leaving
            self.ring()

    def ring(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        """Take back the ringing; to be called before reading what changed."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
