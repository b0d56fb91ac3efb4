"""Seats: what Postgres lets several batch jobs have of one device, and what nobody may."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from shared.capability import SEATS, device_queue
from shared.messages import Hint
from shared.store import Store
from shared.store.cancel import cancel_job
from shared.store.claim import Refusal, claim_rank
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.finish import leave_attempt
from shared.store.snapshot import take_snapshot
from shared.tables import Attempt
from tests.store import world


def seats(store: Store) -> dict[tuple[str, int | None], str]:
    """The attempts that have or await a place, by device and seat."""
    query = "SELECT device_id, seat, attempt_id FROM leases WHERE state <> 'released'"
    with store.transaction() as session:
        return {(row[0], row[1]): row[2] for row in session.execute(text(query))}


def send(
    store: Store, job_id: str, device: str, *, shared: bool, queue: str = "cpu"
) -> Attempt | None:
    return store.call(
        dispatch_attempt,
        world.become_leader(store),
        job_id,
        [Placed(device, device_queue(device) if shared else queue, shared)],
        label="infer:tiny",
        claim_timeout=60,
        device_timeout=60,
        reason="test",
    )


def dispatched(store: Store, device: str, *, shared: bool = False) -> Hint:
    attempt = send(store, world.submit(store, shards=1), device, shared=shared)
    assert attempt is not None
    return world.hints(store, attempt.id)[0]


def test_batch_jobs_get_seats_and_a_training_the_whole_device(store: Store) -> None:
    world.register(store, "cpu0@a")
    world.register(store, "cpu1@a")
    first, second = dispatched(store, "cpu0@a"), dispatched(store, "cpu0@a", shared=True)
    training = world.send(store, world.submit(store), ("cpu1@a", "cpu"))
    assert seats(store) == {
        ("cpu0@a", 0): first.attempt_id,
        ("cpu0@a", 1): second.attempt_id,
        ("cpu1@a", None): training.id,
    }
    devices = {d.id: d for d in store.call(take_snapshot, 60).devices}
    assert [t.job_id for t in devices["cpu0@a"].tenants] == [first.job_id, second.job_id]
    assert devices["cpu1@a"].busy
    assert devices["cpu1@a"].tenants == ()


def test_a_seat_that_is_left_is_given_again(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    first, second = dispatched(store, "cpu0@a"), dispatched(store, "cpu0@a", shared=True)
    holder = world.claim(store, first, "cpu0@a", worker).holder
    store.call(cancel_job, first.job_id, "test")
    assert store.call(leave_attempt, holder)
    third = dispatched(store, "cpu0@a", shared=True)
    assert seats(store) == {
        ("cpu0@a", 0): third.attempt_id,
        ("cpu0@a", 1): second.attempt_id,
    }


def test_what_does_not_share_is_not_sent_where_others_are(store: Store) -> None:
    world.register(store, "cpu0@a")
    dispatched(store, "cpu0@a")
    assert send(store, world.submit(store), "cpu0@a", shared=True) is None, "a training"
    assert send(store, world.submit(store, shards=1), "cpu0@a", shared=False) is None
    world.register(store, "cpu1@a")
    world.send(store, world.submit(store), ("cpu1@a", "cpu"))
    assert send(store, world.submit(store, shards=1), "cpu1@a", shared=True) is None


def test_all_seats_taken(store: Store) -> None:
    world.register(store, "cpu0@a")
    for number in range(SEATS):
        dispatched(store, "cpu0@a", shared=number > 0)
    assert send(store, world.submit(store, shards=1), "cpu0@a", shared=True) is None


@pytest.mark.parametrize(
    ("seat", "other", "allowed"),
    [(0, 1, True), (0, 0, False), (0, None, False), (None, 3, False), (None, None, False)],
)
def test_postgres_itself_lets_no_two_have_the_same(
    store: Store, seat: int | None, other: int | None, allowed: bool
) -> None:
    """Whatever the code does."""
    world.register(store, "cpu0@a")
    world.register(store, "cpu1@a")
    first, second = dispatched(store, "cpu0@a"), dispatched(store, "cpu1@a")

    def put(hint: Hint, seat: int | None) -> None:
        query = "UPDATE leases SET device_id = 'cpu0@a', seat = :seat WHERE attempt_id = :id"
        with store.transaction() as session:
            session.execute(text(query), {"seat": seat, "id": hint.attempt_id})

    put(first, seat)
    if allowed:
        put(second, other)
        return
    with pytest.raises(IntegrityError, match="ex_leases_device"):
        put(second, other)


def test_neighbours_in_the_order_of_names_do_not_collide(store: Store) -> None:
    """Places are numbered by a hash of the device's name."""
    names = [f"gpu{i}@host{j}" for i in range(8) for j in range(40)]
    with store.transaction() as session:
        query = text(
            "SELECT count(DISTINCT hashtextextended(name, 0) / 32) FROM unnest(CAST(:names AS text[])) AS name"
        )
        assert session.execute(query, {"names": names}).scalar_one() == len(names)


def test_a_reservation_moves_without_those_beside_it(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    first, guest = dispatched(store, "cpu0@a"), dispatched(store, "cpu0@a", shared=True)
    world.claim(store, first, "cpu1@a", workers[1])
    world.claim(store, guest, "cpu0@a", workers[0])
    assert seats(store) == {
        ("cpu1@a", 0): first.attempt_id,
        ("cpu0@a", 1): guest.attempt_id,
    }


def test_reservations_change_seats(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    first, guest = dispatched(store, "cpu0@a"), dispatched(store, "cpu0@a", shared=True)
    second = dispatched(store, "cpu1@a")
    world.claim(store, guest, "cpu0@a", workers[0])
    world.claim(store, first, "cpu1@a", workers[1])
    assert seats(store) == {
        ("cpu1@a", 0): first.attempt_id,
        ("cpu0@a", 1): guest.attempt_id,
        ("cpu0@a", 0): second.attempt_id,
    }


def test_a_training_does_not_change_places_with_one_that_has_company(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    first, guest = dispatched(store, "cpu0@a"), dispatched(store, "cpu0@a", shared=True)
    training = world.send(store, world.submit(store), ("cpu1@a", "cpu"))
    hint = world.hints(store, training.id)[0]
    assert store.call(claim_rank, hint, "cpu0@a", workers[0], 60) is Refusal.DEVICE_BUSY
    assert store.call(claim_rank, first, "cpu1@a", workers[1], 60) is Refusal.DEVICE_BUSY
    world.claim(store, guest, "cpu0@a", workers[0])
    world.claim(store, first, "cpu0@a", workers[0])
    world.claim(store, hint, "cpu1@a", workers[1])
