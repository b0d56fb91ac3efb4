"""A process that is stopped inside a transaction keeps nobody waiting for ever."""

from __future__ import annotations

import threading

from sqlalchemy import text
from sqlmodel import Session

from shared.errors import Unavailable
from shared.lifecycle import JobState
from shared.store import Store
from shared.store.cancel import cancel_job
from shared.store.claim import renew_lease
from shared.store.report import record_event
from tests.store import world


def test_connections_say_how_long_a_transaction_may_be_idle(store: Store) -> None:
    def limit(session: Session) -> str:
        found = session.connection().execute(text("SHOW idle_in_transaction_session_timeout"))
        return str(found.scalar_one())

    assert store.call(limit) == "20s"


def test_a_frozen_worker_loses_its_locks_and_writes_nothing(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    attempt = world.send(store, world.submit(store), ("cpu0@a", "cpu"))
    holder = world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", worker).holder
    locked, thawed = threading.Event(), threading.Event()
    said: list[Exception] = []

    def freeze(session: Session) -> None:
        session.connection().execute(
            text("SET LOCAL idle_in_transaction_session_timeout = '500ms'")
        )
        renew_lease(session, holder, 60)
        record_event(session, holder, "note", "never")
        locked.set()
        assert thawed.wait(60)
        record_event(session, holder, "note", "never either")

    def work() -> None:
        try:
            store.call(freeze)
        except Exception as error:
            said.append(error)

    frozen = threading.Thread(target=work)
    frozen.start()
    assert locked.wait(60)
    store.call(cancel_job, holder.job_id, "by the test")  # waits for the lock, and gets it
    thawed.set()
    frozen.join(60)
    [error] = said
    assert isinstance(error, Unavailable), "as if Postgres had been away: it is tried again"
    assert world.job_of(store, holder.job_id).state == JobState.CANCELLING
    told = [e["message"] for e in world.contents(store)["events"] if e["type"] == "note"]
    assert told == []
