"""How often devices fail, from what the store has seen."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from shared.lifecycle import FailureClass
from shared.messages import DEVICE_MTBF
from shared.store import Store
from shared.store.failures import LOOK_BACK, device_mtbf, estimate_mtbf
from shared.store.finish import Failure, fail_rank
from tests.store import world

DAY = 86400.0


def work(store: Store, worker: str, days: float, failure: FailureClass) -> None:
    """A device worked so long, and then the attempt ended by ``failure``."""
    job = world.submit(store)
    attempt = world.send(store, job, ("cpu0@a", "cpu"))
    claimed = world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", worker)
    assert store.call(fail_rank, claimed.holder, Failure(failure, "x", "it ended"))
    with store.engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE leases SET claimed_at = released_at - make_interval(secs => :seconds) "
                "WHERE attempt_id = :attempt"
            ),
            {"seconds": days * DAY, "attempt": attempt.id},
        )


def test_without_evidence_it_is_what_is_assumed(store: Store) -> None:
    assert store.call(device_mtbf) == DEVICE_MTBF


def test_work_and_failures_count(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    work(store, worker, 8, FailureClass.USER_ERROR)
    assert store.call(device_mtbf) == pytest.approx(15 * DAY, rel=1e-3)
    work(store, worker, 5, FailureClass.INFRASTRUCTURE)
    assert store.call(device_mtbf) == pytest.approx(20 / 2 * DAY, rel=1e-3)
    work(store, worker, 1, FailureClass.LOST_DEVICE)
    work(store, worker, 0, FailureClass.PREEMPTED)
    assert store.call(device_mtbf) == pytest.approx(21 / 3 * DAY, rel=1e-3)


def test_what_is_long_past_does_not_count(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    work(store, worker, 3, FailureClass.LOST_DEVICE)
    with store.engine.begin() as connection:
        for table, columns in {"leases": "claimed_at", "attempts": "finished_at"}.items():
            connection.execute(
                text(f"UPDATE {table} SET {columns} = {columns} - make_interval(secs => :s)"),  # noqa: S608
                {"s": LOOK_BACK},
            )
    assert store.call(device_mtbf) == DEVICE_MTBF


def test_little_evidence_changes_little() -> None:
    assert estimate_mtbf(0, 3600) == pytest.approx(DEVICE_MTBF, rel=0.01)
    assert estimate_mtbf(1, 3600) == pytest.approx(DEVICE_MTBF / 2, rel=0.01)
    assert estimate_mtbf(200, 2000 * 7 * DAY) == pytest.approx(10 * 7 * DAY, rel=0.01)
