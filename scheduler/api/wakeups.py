"""One listener per API process that wakes the streams of a job when the job grew."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shared.store import Store
from shared.store.engine import WAKE_JOB

_STOP_CHECK = 0.5


class Wakeups:
    """NOTIFY of ``WAKE_JOB`` fanned out to ``asyncio`` events.

    A wake-up only saves waiting: it can be lost with the connection, so streams poll as well.
    ``start`` and ``close`` are called on the event loop that the streams run on.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: threading.Event | None = None
        self.closing = False
        """The process ends: streams end too, without their ``end`` event, so clients resume."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = threading.Event()
        self.closing = False
        threading.Thread(
            target=self._listen, args=(self._stop,), name="wakeups", daemon=True
        ).start()

    def end_streams(self) -> None:
        """Let every waiting stream end now."""
        self.closing = True
        for events in list(self._waiting.values()):
            for event in events:
                event.set()

    def close(self) -> None:
        """The listening thread ends within half a second; nothing waits for it."""
        self.end_streams()
        if self._stop is not None:
            self._stop.set()

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have grown."""
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def _listen(self, stop: threading.Event) -> None:
        listener = self._store.listen(WAKE_JOB)
        try:
            while not stop.is_set():
                for _, job_id in listener.wait(_STOP_CHECK):
                    self._call(job_id)
        finally:
            listener.close()

    def _call(self, job_id: str) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
