"""Leadership: one scheduler decides, any number stand by.

The lease lives in Postgres and is renewed by a thread of its own, so that a slow tick does not lose
it. Its *term* goes into every act: the store refuses the acts of an old term, so a leader that
stood still past its lease does no harm when it wakes, whatever it still believes.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import datetime

from sqlmodel import Session, select

from scheduler.rescue import Contact
from shared.errors import Unavailable
from shared.store import Store
from shared.store.engine import db_now
from shared.store.leader import lead, resign

log = logging.getLogger(__name__)


class Leadership:
    """Campaigns, renews and, at the end, resigns. Started once, by ``start``."""

    def __init__(
        self,
        store: Store,
        *,
        ttl: float,
        longest_gap: float,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """``longest_gap``: seconds without an answer of Postgres after which it counts as having
        been away. ``on_change`` is called, in the thread, when this process becomes the leader."""
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._store = store
        self._ttl = ttl
        self._on_change = on_change
        self._state = threading.Lock()
        self._term: int | None = None
        self._contact = Contact(longest_gap)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leadership", daemon=True)

    @property
    def term(self) -> int | None:
        """The term in which this process may act; None while it stands by."""
        with self._state:
            return self._term

    @property
    def contact_since(self) -> datetime | None:
        """Since when Postgres answers without a gap; None while it does not."""
        with self._state:
            return self._contact.since

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and resign, so that a standby takes over at once and not after the lease."""
        self._stop.set()
        if not self._thread.is_alive() and self.contact_since is None:
            return  # never started, or Postgres is away
        self._thread.join(timeout=2.0)
        if self.contact_since is None:
            return
        try:
            self._store.call(resign, self.holder)
        except Unavailable:
            log.info("could not resign: the lease runs out by itself")

    def _run(self) -> None:
        while not self._stop.is_set():
            self._beat()
            self._stop.wait(self._ttl / 4)

    def _beat(self) -> None:
        try:
            term, now = self._store.call(_campaign, self.holder, self._ttl)
        except Unavailable as error:
            self._note(None, lost=True)
            log.debug("leadership: %s", error)
        except Exception:
            # Whatever it was, the thread must live: without it the scheduler would stand by for ever.
            self._note(None, lost=True)
            log.exception("leadership: the lease could not be renewed")
        else:
            self._note(term, now=now)

    def _note(self, term: int | None, *, now: datetime | None = None, lost: bool = False) -> None:
        with self._state:
            before, self._term = self._term, term
            if now is not None:
                self._contact = self._contact.answered(now)
            elif lost:
                self._contact = self._contact.lost()
        if term == before:
            return
        if term is None:
            log.warning("leads no more%s", ": the job store cannot be reached" if lost else "")
        else:
            log.info("leads, term %d", term)
            self._on_change()


def _campaign(session: Session, holder: str, ttl: float) -> tuple[int | None, datetime]:
    term = lead(session, holder, ttl)
    return term, session.exec(select(db_now())).one()
