"""The scheduler's loop: lead, look, decide, act, and wait for something to happen.

It wakes by NOTIFY and, because a notification can be lost, also every ``tick_every`` seconds. One
tick is one pass of ``tick``, in the order in which its calls stand there. A tick that fails is logged
and the next one starts from what Postgres says: nothing is remembered between ticks that could be
wrong.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence

from scheduler.admission import admit
from scheduler.dispatch import dispatch, enlarge, shrink
from scheduler.growth import ask_back, free_devices, grow, may_grow
from scheduler.leader import Leadership
from scheduler.placement import Plan, place
from scheduler.publisher import Publisher
from scheduler.rescue import rescue_expired
from shared.errors import Unavailable
from shared.settings import Settings
from shared.store import Store
from shared.store.batches import batch_work
from shared.store.dispatch import set_waiting_reasons
from shared.store.engine import WAKE_SCHEDULER
from shared.store.snapshot import Snapshot, WaitingJob, take_snapshot

log = logging.getLogger(__name__)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds between two ticks at least: as long as the last one took, within these bounds."""
_REPEAT_EVERY = 30.0
"""Seconds after which a trouble that goes on is named again."""


def main(settings: Settings) -> int:
    """Run a scheduler until SIGTERM or SIGINT. The exit status: 0, or 1 if it ended by itself.

    Signals are fetched here and not handled: a handler would run between any two instructions of the
    loop and could touch no lock.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    scheduler = Scheduler(Store(settings.database_url, pool_size=4), settings)
    thread = threading.Thread(target=scheduler.run, name="scheduler", daemon=True)
    thread.start()
    while thread.is_alive():
        if signal.sigtimedwait(signals, 0.5) is not None:
            scheduler.stop()
            # An act that hangs is fenced by then: the leadership is given up.
            thread.join(timeout=2.0)
            return 0
    return 1


class Scheduler:
    """One per process; ``run`` blocks."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._wake = threading.Event()
        self._publisher = Publisher(settings)
        # In less than three quarters of a lease's term no healthy holder can have lost it. And never
        # less than a few of the leader's own renewals, or a busy machine would look like an outage.
        longest_gap = max(0.75 * settings.lease_ttl, settings.leader_ttl)
        self._leadership = Leadership(
            store,
            ttl=settings.leader_ttl,
            longest_gap=longest_gap,
            on_change=self._wake.set,
        )
        self._stopping = False
        self._trouble: tuple[str, float] | None = None

    def run(self) -> None:
        """Wait for Postgres, then tick until ``stop``. Running jobs go on without a scheduler."""
        self._store.wait_until_ready(announce=log.info, timeout=float("inf"))
        bell = threading.Thread(target=self._hear, name="doorbell", daemon=True)
        self._leadership.start()
        bell.start()
        log.info("scheduler %s stands by", self._leadership.holder)
        while not self._stopping:
            self._wake.clear()
            started = time.monotonic()
            self._tick_safely()
            # A burst of submissions becomes a few ticks, and a long queue takes half a core at most. No
            # event may cut it short, or a busy fleet would wake it at once.
            time.sleep(min(max(_SHORTEST_PAUSE, time.monotonic() - started), _LONGEST_PAUSE))
            if not self._stopping:
                self._wake.wait(self._settings.tick_every)
        self._publisher.close()
        log.info("scheduler ends")

    def stop(self) -> None:
        """Resign, so that a standby takes over at once, and let ``run`` return. From any thread."""
        self._stopping = True
        self._wake.set()
        self._leadership.stop()

    def tick(self) -> None:
        """One pass. Does nothing while another scheduler leads.

        Raises:
            Unavailable: Postgres cannot be reached.
        """
        term, contact_since = self._leadership.term, self._leadership.contact_since
        if term is None or contact_since is None:
            return
        settings, store = self._settings, self._store
        rescue_expired(store, term, contact_since, settings)
        snapshot = store.call(take_snapshot, settings.device_timeout)
        self._place_and_dispatch(term, snapshot)
        self._publisher.publish_due(store)

    def _place_and_dispatch(self, term: int, snapshot: Snapshot) -> None:
        admission = admit(snapshot.jobs, snapshot.now)
        plan = place(snapshot.devices, admission.ready)
        jobs = {job.id: job for job in admission.ready}
        for job_id, placement in plan.placements.items():
            dispatch(self._store, term, jobs[job_id], placement, self._settings)
        self._resize_batches(term, snapshot, admission.ready, plan)
        known = {job.id: job.waiting_reason for job in snapshot.jobs}
        reasons = admission.held_back | plan.waiting
        changed = {id: reason for id, reason in reasons.items() if known[id] != reason}
        if changed:
            self._store.call(set_waiting_reasons, changed)

    def _resize_batches(
        self, term: int, snapshot: Snapshot, waiting: Sequence[WaitingJob], plan: Plan
    ) -> None:
        """Batch jobs give ranks back to jobs that wait, and get the devices that nobody waits for."""
        for asked in ask_back(snapshot.devices, waiting, plan, snapshot.batches):
            shrink(self._store, term, asked)
        free = free_devices(snapshot.devices, plan)
        growing = [batch.id for batch in snapshot.batches if may_grow(batch)]
        if free and growing:
            work = self._store.call(batch_work, growing)
            for growth in grow(snapshot.devices, free, snapshot.batches, work):
                enlarge(self._store, term, growth, self._settings)

    def _tick_safely(self) -> None:
        try:
            self.tick()
        except Unavailable as error:
            self._complain(f"waiting: {error}", None)
        except Exception as error:
            # A tick must not end the loop: what fails once may well be one job, or one moment.
            self._complain(f"a tick failed and is tried again: {type(error).__name__}", error)
        else:
            if self._trouble is not None:
                log.info("ticks again")
            self._trouble = None

    def _complain(self, message: str, error: Exception | None) -> None:
        """Once, and again every so often while it lasts."""
        now = time.monotonic()
        if self._trouble is not None:
            said, at = self._trouble
            if said == message and now - at < _REPEAT_EVERY:
                return
        self._trouble = (message, now)
        log.error(message, exc_info=error) if error else log.warning(message)

    def _hear(self) -> None:
        listener = self._store.listen(WAKE_SCHEDULER)
        while not self._stopping:
            if listener.wait(1.0):
                self._wake.set()
        listener.close()
