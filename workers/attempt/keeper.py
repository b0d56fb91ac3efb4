"""Keeping the lease: the thread that renews it and hears in the answers what shall happen."""

from __future__ import annotations

import logging
import threading
import time

from shared.errors import Unavailable
from shared.lifecycle import FailureClass
from shared.settings import Settings
from shared.store import Holder, Store
from shared.store.claim import Answer, renew_lease
from workers.attempt.inbox import Inbox
from workers.attempt.outcome import Cancelled, Failed, Stale, failed

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews every ``lease_renew_every`` seconds, and at once when told (``renew_now``).

    An outage of Postgres is waited for; after ``abandon_after`` seconds without an answer the
    attempt is told to end: by then somebody may rightly have taken it over.
    """

    def __init__(self, store: Store, settings: Settings, holder: Holder, inbox: Inbox) -> None:
        self._store = store
        self._settings = settings
        self._holder = holder
        self._inbox = inbox
        self._now = threading.Event()
        self._closed = self._concluding = False
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def renew_now(self) -> None:
        """Something may have changed; not asked any more once the attempt concludes."""
        if not self._concluding:
            self._now.set()

    def conclude(self) -> None:
        """Only keep the lease from now on: what wakes us is the end that we report ourselves."""
        self._concluding = True

    def go_on(self) -> None:
        """The attempt did not conclude, as its rows were not all there."""
        self._concluding = False

    def close(self) -> None:
        """No renewal is under way once this returns."""
        self._closed = True
        self._now.set()
        self._thread.join()

    def _run(self) -> None:
        answered, away = time.monotonic(), False
        while not self._closed:
            try:
                self._renew()
                if away:
                    log.info("renewed again after %.0f s", time.monotonic() - answered)
                answered, away = time.monotonic(), False
            except Unavailable as error:
                silent = time.monotonic() - answered
                if not away:
                    log.warning("cannot renew: %s; the run goes on", error)
                    away = True
                if silent > self._settings.abandon_after:
                    self._inbox.end_with(_abandoned(silent))
            except Exception:
                # A defect must not let the lease run out in silence: it is tried again and logged.
                log.exception("cannot renew")
            self._now.wait(
                min(1.0, self._settings.lease_renew_every)
                if away
                else self._settings.lease_renew_every
            )
            self._now.clear()

    def _renew(self) -> None:
        renewal = self._store.call(renew_lease, self._holder, self._settings.lease_ttl)
        self._inbox.leave(renewal.answer is Answer.LEAVE)
        match renewal.answer:
            case Answer.LEAVE:
                pass
            case Answer.CANCEL:
                self._inbox.end_with(Cancelled())
            case Answer.STOP:
                self._inbox.end_with(Stale())
            case Answer.GO_ON:
                if renewal.rendezvous is not None:
                    self._inbox.join(renewal.rendezvous)


def _abandoned(silent: float) -> Failed:
    return failed(
        FailureClass.LOST_WORKER,
        "abandoned",
        f"the worker could not renew its lease for {silent:.0f} s and gave the attempt up",
        "See whether its host reaches Postgres.",
    )
