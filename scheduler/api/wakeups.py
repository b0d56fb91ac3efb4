"""One listener per API process that wakes the streams of a job when the job grew."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from shared.store import Store
from shared.store.engine import WAKE_JOB

log = logging.getLogger("gpuyard.api")
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
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.closing = False
        """The process ends: streams end too, without their ``end`` event, so clients resume."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop.clear()
        self.closing = False
        self._thread = threading.Thread(target=self._listen, name="wakeups", daemon=True)
        self._thread.start()

    def end_streams(self) -> None:
        """Let every waiting stream end now."""
        self.closing = True
        for events in list(self._waiting.values()):
            for event in events:
                event.set()

    def close(self) -> None:
        self.end_streams()
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_CHECK + 6)
            self._thread = None

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

    def _listen(self) -> None:
        listener = self._store.listen(WAKE_JOB)
        try:
            while not self._stop.is_set():
                for _, job_id in listener.wait(_STOP_CHECK):
                    self._call(job_id)
        finally:
            listener.close()

    def _call(self, job_id: str) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
