"""Measuring configurations of trainings whose memory nobody has measured, one at a time on a host.

The answer of a rank is bytes of tensors; what a process takes besides is added here, as the arithmetic of
the scheduler does. A worker that ends in the middle leaves its claim to expire.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import Unavailable
from shared.footprint import RUNTIME, Configuration
from shared.messages import Failed, Measure, Measured
from shared.store import Store
from shared.store.engine import WAKE_MEASURE
from shared.store.footprints import claim_measurement, fail_measurement, record_measurement
from shared.tables import Footprint
from workers.channel import ChannelClosed
from workers.launch import LaunchFailed, launch

log = logging.getLogger(__name__)

LIMIT = 300.0
"""Seconds that one measurement may take."""
EXPIRES_AFTER = 2 * LIMIT
LISTEN_SECONDS = 15.0
_STEP = 0.5


class Measuring:
    """The thread of one device's worker; those of a host take turns."""

    def __init__(
        self, store: Store, worker: str, nursery: Path, folder: Path, closing: threading.Event
    ) -> None:
        self._store = store
        self._worker = worker
        self._nursery = nursery
        self._folder = folder
        self._closing = closing
        self._idle = threading.Lock()

    def run(self) -> None:
        """Until the worker closes."""
        listener = self._store.listen(WAKE_MEASURE)
        while not self._closing.is_set():
            try:
                while not self._closing.is_set() and self._measure_one():
                    pass
            except (Unavailable, LaunchFailed) as error:
                log.warning("nothing is measured: %s", error)
            except Exception:
                log.exception("nothing is measured")
            listener.wait(LISTEN_SECONDS)
        listener.close()

    def wait(self) -> None:
        """Once the worker is closing: until no process of a measurement lives."""
        with self._idle:
            pass

    def _measure_one(self) -> bool:
        """False: there is nothing to measure, or another worker of this host is at it."""
        with self._idle, self._turn() as mine:
            if not mine or self._closing.is_set():
                return False
            footprint = self._store.call(claim_measurement, self._worker, EXPIRES_AFTER)
            if footprint is None:
                return False
            answer = self._ask_rank(footprint)
            if answer is None:
                return False
            key = footprint.key
            if isinstance(answer, Measured):
                log.info("measured %s: %.2f GB", key[:12], answer.bytes / 1e9)
                whole = answer.bytes + RUNTIME
                self._store.call(record_measurement, key, self._worker, whole)
            else:
                log.warning("%s cannot be measured: %s", key[:12], answer)
                self._store.call(fail_measurement, key, self._worker, answer)
            return True

    def _ask_rank(self, footprint: Footprint) -> Measured | str | None:
        """What a rank of its own answered, or why it did not. None: the worker is closing."""
        log_path = self._folder / "measure.log"
        asked = Measure(configuration=Configuration.model_validate(footprint.configuration))
        deadline = time.monotonic() + LIMIT
        with launch(self._nursery, "measure", env={}, log_path=log_path) as rank:
            try:
                rank.channel.send(asked)
                while time.monotonic() < deadline:
                    if self._closing.is_set():
                        return None
                    report = rank.channel.receive(_STEP)
                    if isinstance(report, Measured):
                        return report
                    if isinstance(report, Failed):
                        return report.message
            except ChannelClosed:
                return "the process that measured it died"
        return f"it was not done in {LIMIT:g} s"

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether it is this worker's turn. The kernel takes the lock back from one that dies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "measure.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
