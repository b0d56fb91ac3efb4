"""Submission to the store: idempotency, and what a snapshot makes of it."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from shared.errors import IdempotencyMismatch
from shared.resolved import Resolved, ResolvedModel
from shared.store import Store
from shared.store.dispatch import set_waiting_reasons
from shared.store.engine import WAKE_SCHEDULER
from shared.store.read import committed_shards, events_after, get_job, list_jobs
from shared.store.snapshot import take_snapshot
from shared.store.submit import insert_job, new_job_id
from shared.tables import Job
from tests.store import world

RESOLVED = Resolved(
    model=ResolvedModel(source="folder", path="/m", label="bert"),
    requirements=world.needs(memory_bytes=5),
    inputs={},
)


def insert(store: Store, key: str | None, owner: str | None = None, **spec: object) -> Job:
    job, _ = store.call(
        insert_job,
        job_id=new_job_id(),
        spec=world.train_spec(**spec),
        resolved=RESOLVED,
        idempotency_key=key,
        created_by=owner,
    )
    return job


@pytest.mark.parametrize("owner", [None, "key_1"])
def test_a_repeat_returns_the_first_job(store: Store, owner: str | None) -> None:
    first = insert(store, "k", owner)
    assert insert(store, "k", owner).id == first.id
    assert insert(store, "other", owner).id != first.id
    assert insert(store, "k", "key_2").id != first.id
    with pytest.raises(IdempotencyMismatch, match=first.id):
        insert(store, "k", owner, name="another spec")


def test_no_key_is_no_repeat(store: Store) -> None:
    assert insert(store, None).id != insert(store, None).id


def test_one_of_many_requests_at_once_makes_the_job(store: Store) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(insert(store, "k").id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(store.call(list_jobs)) == 1
    assert [e.type for e in store.call(events_after, found[0], 0)] == ["submitted"]


def test_snapshot_tells_what_placement_needs(store: Store) -> None:
    job = insert(store, None, priority=7)
    store.call(set_waiting_reasons, {job.id: "because", "job_none": "x"})
    (waiting,) = store.call(take_snapshot, 60).jobs
    assert (waiting.id, waiting.priority, waiting.label) == (job.id, 7, "train:bert")
    assert waiting.requirements == RESOLVED.requirements
    assert (waiting.waiting_reason, waiting.ranks_ending) == ("because", False)


def test_a_silent_device_is_known_and_not_live(store: Store) -> None:
    world.register(store, "cpu0@a")
    with store.transaction() as session:
        session.execute(text("UPDATE workers SET heartbeat_at = now() - interval '1 hour'"))
    (device,) = store.call(take_snapshot, 60).devices
    assert (device.known, device.live) == (True, False)


def test_reasons_go_only_to_queued_jobs(store: Store) -> None:
    world.register(store, "cpu0@a")
    job_id = world.submit(store)
    world.send(store, job_id, ("cpu0@a", "cpu"))
    store.call(set_waiting_reasons, {job_id: "late"})
    assert world.job_of(store, job_id).waiting_reason is None
    store.call(set_waiting_reasons, {})


def test_submission_wakes_the_scheduler(store: Store) -> None:
    listener = store.listen(WAKE_SCHEDULER)
    assert listener.wait(0.01) == []  # connects
    insert(store, None)
    assert listener.wait(5) == [(WAKE_SCHEDULER, "")]
    listener.close()


def test_a_listener_survives_the_loss_of_its_connection(store: Store) -> None:
    listener = store.listen(WAKE_SCHEDULER)
    listener.wait(0.01)
    with store.transaction() as session:
        session.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            )
        )
    assert listener.wait(1) == []
    listener.wait(0.01)
    insert(store, None)
    assert listener.wait(5) == [(WAKE_SCHEDULER, "")]
    listener.close()


def test_a_failed_insert_leaves_nothing(store: Store) -> None:
    job_id = world.submit(store, shards=3)
    with pytest.raises(Exception, match="pk_jobs"):
        store.call(insert_job, job_id=job_id, spec=world.infer_spec(), resolved=RESOLVED)
    assert store.call(get_job, "job_none") is None
    assert store.call(committed_shards, job_id) == []
