"""Claims: who gets the rank, and how reservations move between devices of a class."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from shared.capability import device_queue
from shared.lifecycle import JobState
from shared.messages import Hint
from shared.store import Store
from shared.store.cancel import cancel_job
from shared.store.claim import Claimed, Refusal, claim_rank
from shared.store.dispatch import due_hints
from shared.store.finish import fail_rank
from tests.store import world


def devices_of(store: Store, attempt_id: str) -> list[str]:
    with store.transaction() as session:
        query = text("SELECT device_id FROM leases WHERE attempt_id = :id ORDER BY rank")
        return list(session.execute(query, {"id": attempt_id}).scalars())


def dispatched(store: Store, device: str, queue: str = "cpu") -> Hint:
    attempt = world.send(store, world.submit(store), (device, queue))
    return world.hints(store, attempt.id)[0]


def test_second_claim_is_refused(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    hint = dispatched(store, "cpu0@a")
    world.claim(store, hint, "cpu0@a", worker)
    assert store.call(claim_rank, hint, "cpu0@a", worker, 60) is Refusal.CLAIMED
    assert store.call(due_hints) == []


def test_reservation_moves_to_a_free_device_of_the_class(store: Store) -> None:
    world.register(store, "cpu0@a")
    other = world.register(store, "cpu1@a")
    hint = dispatched(store, "cpu0@a")
    world.claim(store, hint, "cpu1@a", other)
    assert devices_of(store, hint.attempt_id) == ["cpu1@a"]


def test_reservations_change_places(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    first, second = dispatched(store, "cpu0@a"), dispatched(store, "cpu1@a")
    world.claim(store, second, "cpu0@a", workers[0])
    assert devices_of(store, first.attempt_id) == ["cpu1@a"]
    world.claim(store, first, "cpu1@a", workers[1])


def test_a_device_reserved_for_a_rank_of_its_own_is_not_given_away(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(3)]
    gang = world.submit(store, world.needs(devices=2))
    attempt = world.send(
        store, gang, ("cpu0@a", device_queue("cpu0@a")), ("cpu1@a", device_queue("cpu1@a"))
    )
    single = dispatched(store, "cpu2@a")
    assert store.call(claim_rank, single, "cpu0@a", workers[0], 60) is Refusal.DEVICE_BUSY
    assert devices_of(store, attempt.id) == ["cpu0@a", "cpu1@a"]
    assert devices_of(store, single.attempt_id) == ["cpu2@a"]


def test_a_busy_device_takes_no_second_rank(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    first, second = dispatched(store, "cpu0@a"), dispatched(store, "cpu1@a")
    world.claim(store, first, "cpu0@a", workers[0])
    assert store.call(claim_rank, second, "cpu0@a", workers[0], 60) is Refusal.DEVICE_BUSY
    world.claim(store, second, "cpu1@a", workers[1])


@pytest.mark.timeout(120)
def test_workers_that_hold_each_others_hint_do_not_wait_for_each_other(store: Store) -> None:
    """Three devices, three hints, each taken by the next device, all at once, many times over. Taken in
    another order the locks of two claims close a circle, and Postgres needs a second to notice."""
    names = [f"cpu{i}@a" for i in range(3)]
    workers = {name: world.register(store, name) for name in names}
    for _ in range(8):
        hints = [dispatched(store, name) for name in names]
        barrier = threading.Barrier(3)
        answers: dict[str, Claimed | Refusal] = {}

        def take(hint: Hint, name: str) -> None:
            barrier.wait()  # noqa: B023
            answers[name] = store.call(claim_rank, hint, name, workers[name], 60)  # noqa: B023

        threads = [
            threading.Thread(target=take, args=(hint, names[(i + 1) % 3]))
            for i, hint in enumerate(hints)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, hint in enumerate(hints):
            claimed = answers[names[(i + 1) % 3]]
            if claimed is Refusal.DEVICE_BUSY:  # its device was taken first by another's swap
                continue
            assert isinstance(claimed, Claimed)
            assert devices_of(store, hint.attempt_id) == [names[(i + 1) % 3]]
            assert store.call(fail_rank, claimed.holder, world.failure())
        for hint in hints:
            store.call(cancel_job, hint.job_id, "test")
    with store.transaction() as session:
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        session.execute(text("SELECT pg_stat_force_next_flush()"))
        assert session.execute(text(query)).scalar_one() == 0


def test_a_cancelled_job_is_not_claimed(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    hint = dispatched(store, "cpu0@a")
    store.call(cancel_job, hint.job_id, "test")
    assert store.call(claim_rank, hint, "cpu0@a", worker, 60) is Refusal.CANCELLED


def test_a_replaced_worker_claims_nothing(store: Store) -> None:
    old = world.register(store, "cpu0@a")
    new = world.register(store, "cpu0@a")
    hint = dispatched(store, "cpu0@a")
    assert store.call(claim_rank, hint, "cpu0@a", old, 60) is Refusal.NOT_SERVING
    world.claim(store, hint, "cpu0@a", new)


def test_job_runs_once_every_rank_is_claimed(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    job_id = world.submit(store, world.needs(devices=2))
    attempt = world.send(store, job_id, ("cpu0@a", "cpu"), ("cpu1@a", "cpu"))
    first, second = world.hints(store, attempt.id)
    world.claim(store, first, "cpu0@a", workers[0])
    assert world.job_of(store, job_id).state == JobState.DISPATCHED
    claimed = world.claim(store, second, "cpu1@a", workers[1])
    assert world.job_of(store, job_id).state == JobState.RUNNING
    assert (claimed.world_size, claimed.holder.rank, claimed.attempt_number) == (2, 1, 1)


def test_unknown_and_old_hints_are_stale(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    hint = dispatched(store, "cpu0@a")
    claimed = world.claim(store, hint, "cpu0@a", worker)
    assert store.call(fail_rank, claimed.holder, world.failure())
    again = world.send(store, hint.job_id, ("cpu0@a", "cpu"))
    assert store.call(claim_rank, hint, "cpu0@a", worker, 60) is Refusal.STALE
    forged = Hint(job_id="job_none", attempt_id="att_none", token=1, rank=0)
    assert store.call(claim_rank, forged, "cpu0@a", worker, 60) is Refusal.STALE
    beyond = world.hints(store, again.id)[0].model_copy(update={"rank": 7})
    assert store.call(claim_rank, beyond, "cpu0@a", worker, 60) is Refusal.STALE
