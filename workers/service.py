"""What one device's worker process does beside Celery: registers, is alive, runs hints, drains.

Celery calls ``run_hint`` in its pool threads (in several at once where batch jobs share the device) and
``cancel_tasks`` for a revoke; nothing here knows Celery. Threads beside: heartbeat and housekeeping;
wake-ups from Postgres; cancels that were asked for; measuring what configurations need.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.errors import Unavailable
from shared.lifecycle import FailureClass
from shared.messages import Hint
from shared.settings import Settings
from shared.store import Store
from shared.store.cancel import cancel_attempt
from shared.store.claim import Refusal
from shared.store.devices import drain_device, end_worker, heartbeat, register_device
from shared.store.engine import WAKE_ATTEMPT
from workers.attempt.insist import GivenUp, Insistent
from workers.attempt.outcome import Outcome, failed
from workers.attempt.run import RunningAttempt, claim
from workers.attempt.site import Site
from workers.engine_host import WarmEngine
from workers.inventory import LocalDevice
from workers.leftovers import end_left_overs
from workers.measuring import Measuring
from workers.tree import unix_address

log = logging.getLogger(__name__)

LISTEN_SECONDS = 2.0


class DeviceService:
    """One device, one life of its worker process."""

    def __init__(
        self, settings: Settings, device: LocalDevice, nursery: Path, folder: Path, version: str
    ) -> None:
        self.settings = settings
        self.device = device
        self.store = Store(settings.database_url, pool_size=4)
        self._nursery = nursery
        self._version = version
        self._engine = WarmEngine(device, nursery, folder, settings.end_grace)
        self._site: Site | None = None
        self._changed = threading.Condition()
        self._running: list[RunningAttempt] = []
        self._busy = 0
        """Hints that are being followed: one, or several for batch jobs that share the device."""
        self._draining = False
        self._hurried = threading.Event()
        self._closing = threading.Event()
        self._give_up = threading.Event()
        self._cancels: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._measuring = Measuring(self.store, device.id, nursery, folder, self._closing)
        self.on_replaced: Callable[[], None] = self.hurry
        """Called when another process serves the device now: this one has to end."""

    def prepare(self) -> None:
        """Wait for Postgres and the nursery, with a message; then end what an earlier life left."""
        self.store.wait_until_ready(announce=log.warning)
        _wait_for_nursery(self._nursery)
        end_left_overs(self.settings.data, self.device.id)

    def register(self) -> None:
        """Offer the device. What the process before this one held ends now as lost."""
        store = Insistent(self.store, self._give_up)
        try:
            worker_id = store.call(register_device, self.device.facts, os.getpid(), self._version)
        except GivenUp:
            return
        self._site = Site(
            self.settings, self.store, self.device, worker_id, self._nursery, self._engine
        )
        for target in (self._beat, self._listen, self._carry_out_cancels, self._measuring.run):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        log.info("serves %s (%s)", self.device.facts.model, self.device.facts.capability.queue)

    def run_hint(self, hint: Hint, on_claimed: Callable[[], None]) -> Refusal | Outcome:
        """Claim the rank that the hint is about, and run it to its end.

        Raises:
            GivenUp: Postgres did not answer until this process had to end.
        """
        with self._changed:
            if self._site is None or self._draining:
                return Refusal.NOT_SERVING
            self._busy += 1
        attempt: RunningAttempt | None = None
        try:
            claimed = claim(self._site, hint, self._give_up)
            if isinstance(claimed, Refusal):
                log.info("the hint for %s leads to nothing: %s", hint.task_id, claimed)
                return claimed
            on_claimed()
            attempt = RunningAttempt(self._site, claimed, self._give_up)
            with self._changed:
                self._running.append(attempt)
            return attempt.run()
        finally:
            with self._changed:
                self._busy -= 1
                if attempt is not None:
                    self._running.remove(attempt)
                self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """The device is at work: hints that any device of its class may take are left to others."""
        return self._busy > 0

    def cancel_tasks(self, task_ids: Iterable[str]) -> None:
        """Cancel the jobs of these Celery tasks. Returns at once; Postgres may be away."""
        for task_id in task_ids:
            self._cancels.put(task_id)

    def describe(self) -> dict[str, Any]:
        """For monitors: what the device can do, what it runs and what it holds warm."""
        facts = self.device.facts
        with self._changed:
            running = list(self._running)
        return {
            "id": facts.id,
            "model": facts.model,
            "simulated": facts.simulated,
            "class": facts.capability.queue,
            "memory_gib": round(facts.capability.memory_bytes / 1024**3, 1),
            "uuid": facts.uuid,
            "warm": self._engine.warm,
            "runs": [attempt.describe() for attempt in running],
            "draining": self._draining,
        }

    def drain(self) -> None:
        """Take nothing new; give what runs ``drain_grace`` seconds, in which a training makes a
        checkpoint and leaves; then end what still runs. Either is tried again elsewhere at no cost of
        a try. Leaves no process, and says goodbye in the store."""
        with self._changed:
            self._draining = True
        if self._site is None:
            self._give_up.set()
            return
        self._try(drain_device)
        self._ask_back()
        if not self._idle_within(self.settings.drain_grace, self._hurried):
            self._preempt()
            # Beyond the grace of the ranks: what a store that answers needs for the last reports.
            if not self._idle_within(self.settings.end_grace + 10.0, None):
                log.warning("Postgres does not answer: the end of the attempt is not reported")
                self._give_up.set()
                self._idle_within(self.settings.end_grace + 10.0, None)
        self._closing.set()
        self._engine.end()
        self._measuring.wait()
        self._try(end_worker)

    def hurry(self) -> None:
        """Give running attempts no more time."""
        self._hurried.set()
        with self._changed:
            self._changed.notify_all()

    def _ask_back(self) -> None:
        with self._changed:
            running = list(self._running)
        for attempt in running:
            attempt.ask_back(self._why_stopped, self.settings.drain_grace)

    def _preempt(self) -> None:
        with self._changed:
            running = list(self._running)
        for attempt in running:
            log.info("a running attempt is ended and will be tried again")
            end = failed(FailureClass.PREEMPTED, "drained", self._why_stopped)
            attempt.inbox.end_with(end)

    @property
    def _why_stopped(self) -> str:
        return f"the worker of {self.device.id} was stopped"

    def _idle_within(self, seconds: float, hurried: threading.Event | None) -> bool:
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._busy:
                left = deadline - time.monotonic()
                if left <= 0 or (hurried is not None and hurried.is_set()):
                    return False
                self._changed.wait(left)
        return True

    def _try(self, function: Callable[..., bool]) -> None:
        assert self._site is not None  # noqa: S101 - called after registration only
        try:
            self.store.call(function, self._site.worker_id)
        except Unavailable as error:
            log.warning("%s: %s", function.__name__, error)

    def _beat(self) -> None:
        assert self._site is not None  # noqa: S101 - started by register
        away = False
        while not self._closing.wait(self.settings.heartbeat_every):
            try:
                served = self.store.call(heartbeat, self._site.worker_id, self._engine.warm)
                away = False
                if not served and not self._closing.is_set():
                    log.error("another process serves %s now: this one ends", self.device.id)
                    self.on_replaced()
                    return
            except Unavailable as error:
                if not away:
                    log.warning("no heartbeat: %s", error)
                away = True
            except Exception:
                log.exception("no heartbeat")
            self._engine.end_if_idle()

    def _listen(self) -> None:
        listener = self.store.listen(WAKE_ATTEMPT)
        while not self._closing.is_set():
            for _, attempt_id in listener.wait(LISTEN_SECONDS):
                with self._changed:
                    running = list(self._running)
                for attempt in running:
                    if attempt.holder.attempt_id == attempt_id:
                        attempt.renew_now()
        listener.close()

    def _carry_out_cancels(self) -> None:
        store = Insistent(self.store, self._closing)
        while True:
            task_id = self._cancels.get()
            try:
                asked = store.call(cancel_attempt, task_id.rpartition(".")[0], "revoked in Flower")
                log.info("revoke of %s: %s", task_id, "cancels its job" if asked else "too late")
            except GivenUp:
                return
            except Exception:
                log.exception("revoke of %s failed", task_id)


def _wait_for_nursery(path: Path) -> None:
    """Until it listens: a device that cannot start a rank should not be offered."""
    started, said_at = time.monotonic(), 0.0
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                with unix_address(path) as address:
                    connection.connect(address)
                return
            except OSError as error:
                now = time.monotonic()
                if now - started > 20 and now - said_at > 30:
                    log.warning("waiting: the nursery of this host is not up: %s", error)
                    said_at = now
        time.sleep(0.1)
