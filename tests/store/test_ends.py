"""How jobs end: cancel in each state, gangs, retries, devices that leave."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from shared.errors import NotFound
from shared.lifecycle import FailureClass, JobState
from shared.store import Store
from shared.store.cancel import cancel_job, fail_queued_job
from shared.store.claim import Answer, Claimed, Refusal, claim_rank, renew_lease
from shared.store.devices import drain_device, end_worker, heartbeat
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.finish import fail_rank, finish_rank, leave_attempt, release_lease
from shared.store.leader import lead, leads, resign
from shared.store.snapshot import take_snapshot
from tests.store import world


def gang(store: Store) -> tuple[str, list[Claimed]]:
    """A running gang of two."""
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    job_id = world.submit(store, world.needs(devices=2))
    attempt = world.send(store, job_id, ("cpu0@a", "cpu"), ("cpu1@a", "cpu"))
    claimed = [
        world.claim(store, hint, f"cpu{i}@a", workers[i])
        for i, hint in enumerate(world.hints(store, attempt.id))
    ]
    return job_id, claimed


def state(store: Store, job_id: str) -> str:
    return world.job_of(store, job_id).state


def busy(store: Store) -> list[str]:
    return [d.id for d in store.call(take_snapshot, 60).devices if d.busy]


def test_cancel_a_queued_job(store: Store) -> None:
    job_id = world.submit(store)
    assert store.call(cancel_job, job_id, "enough").state == JobState.CANCELLED
    again = store.call(cancel_job, job_id, "once more")
    assert (again.state, again.cancel_reason) == (JobState.CANCELLED, "enough")


def test_cancel_a_dispatched_job(store: Store) -> None:
    world.register(store, "cpu0@a")
    job_id = world.submit(store)
    world.send(store, job_id, ("cpu0@a", "cpu"))
    assert store.call(cancel_job, job_id, "enough").state == JobState.CANCELLED
    assert busy(store) == []


def test_cancel_a_half_claimed_gang(store: Store) -> None:
    workers = [world.register(store, f"cpu{i}@a") for i in range(2)]
    job_id = world.submit(store, world.needs(devices=2))
    attempt = world.send(store, job_id, ("cpu0@a", "cpu"), ("cpu1@a", "cpu"))
    first, second = world.hints(store, attempt.id)
    holder = world.claim(store, first, "cpu0@a", workers[0]).holder
    assert store.call(cancel_job, job_id, "enough").state == JobState.CANCELLING
    assert store.call(claim_rank, second, "cpu1@a", workers[1], 60) is Refusal.CANCELLED
    assert store.call(renew_lease, holder, 60).answer is Answer.CANCEL
    assert store.call(leave_attempt, holder)
    assert state(store, job_id) == JobState.CANCELLED
    assert busy(store) == []


def test_cancel_a_running_gang(store: Store) -> None:
    job_id, (first, second) = gang(store)
    store.call(cancel_job, job_id, "enough")
    assert store.call(leave_attempt, first.holder)
    assert state(store, job_id) == JobState.CANCELLING
    assert busy(store) == ["cpu1@a"]
    assert store.call(leave_attempt, second.holder)
    assert state(store, job_id) == JobState.CANCELLED


def test_cancel_comes_after_one_rank_has_finished(store: Store) -> None:
    """The last rank to end finished before it heard; the other one had left."""
    job_id, (first, second) = gang(store)
    store.call(cancel_job, job_id, "enough")
    assert store.call(leave_attempt, first.holder)
    assert store.call(finish_rank, second.holder, {})
    assert state(store, job_id) == JobState.CANCELLED


def test_cancel_comes_after_all_have_finished_their_work(store: Store) -> None:
    job_id, claimed = gang(store)
    store.call(cancel_job, job_id, "enough")
    for rank in claimed:
        assert store.call(finish_rank, rank.holder, {"rank": rank.holder.rank})
    job = world.job_of(store, job_id)
    assert job.state == JobState.SUCCEEDED
    assert job.summary is not None
    assert (job.summary["rank"], set(job.summary)) == (0, {"rank", "device_seconds"})


def test_a_failed_rank_ends_a_cancelled_job(store: Store) -> None:
    job_id, (first, second) = gang(store)
    store.call(cancel_job, job_id, "enough")
    assert store.call(fail_rank, first.holder, world.failure())
    assert state(store, job_id) == JobState.CANCELLED
    assert store.call(renew_lease, second.holder, 60).answer is Answer.STOP
    assert store.call(release_lease, second.holder)
    assert busy(store) == []


def test_cancel_what_is_not_there(store: Store) -> None:
    with pytest.raises(NotFound, match="job_none"):
        store.call(cancel_job, "job_none", "x")


def test_a_rank_that_gives_up_its_lease_loses_the_attempt(store: Store) -> None:
    job_id, (first, second) = gang(store)
    assert store.call(release_lease, first.holder)
    assert state(store, job_id) == JobState.QUEUED
    assert store.call(renew_lease, second.holder, 60).answer is Answer.STOP


def test_no_attempt_starts_while_ranks_of_the_last_hold_devices(store: Store) -> None:
    job_id, (first, second) = gang(store)
    world.register(store, "cpu2@a")
    assert store.call(fail_rank, first.holder, world.failure())
    (waiting,) = store.call(take_snapshot, 60).jobs
    assert waiting.ranks_ending
    again = [Placed("cpu0@a", "cpu"), Placed("cpu2@a", "cpu")]
    kw = {"label": "x", "claim_timeout": 60.0, "device_timeout": 60.0, "reason": "x"}
    term = world.become_leader(store)
    assert store.call(dispatch_attempt, term, job_id, again, **kw) is None  # type: ignore[arg-type]
    assert store.call(release_lease, second.holder)
    assert store.call(dispatch_attempt, term, job_id, again, **kw) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failure_class", "after"),
    [
        (FailureClass.USER_ERROR, JobState.FAILED),
        (FailureClass.DATA_ERROR, JobState.FAILED),
        (FailureClass.LOST_WORKER, JobState.QUEUED),
        (FailureClass.PREEMPTED, JobState.QUEUED),
        (FailureClass.OUT_OF_MEMORY, JobState.QUEUED),
    ],
)
def test_failure_is_decided_by_its_class(
    store: Store, failure_class: FailureClass, after: JobState
) -> None:
    job_id, (first, _) = gang(store)
    assert store.call(fail_rank, first.holder, world.failure(failure_class))
    job = world.job_of(store, job_id)
    assert job.state == after
    if after is JobState.FAILED:
        assert job.failure_class == failure_class
        assert job.failure is not None
        assert job.failure["message"] == "for a test"


def test_attempts_are_used_up(store: Store) -> None:
    worker = world.register(store, "cpu0@a")
    job_id = world.submit(store)  # three attempts
    for number in (1, 2, 3):
        assert state(store, job_id) == JobState.QUEUED
        attempt = world.send(store, job_id, ("cpu0@a", "cpu"))
        assert (attempt.number, attempt.token) == (number, number)
        holder = world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", worker).holder
        assert store.call(fail_rank, holder, world.failure())
    assert state(store, job_id) == JobState.FAILED


def test_a_restarted_worker_ends_what_it_held(store: Store) -> None:
    job_id, (first, second) = gang(store)
    new = world.register(store, "cpu0@a")
    assert state(store, job_id) == JobState.QUEUED
    assert busy(store) == ["cpu1@a"]
    assert not store.call(heartbeat, first.holder.worker_id)
    assert store.call(heartbeat, new)
    assert store.call(renew_lease, second.holder, 60).answer is Answer.STOP


def test_a_restarted_worker_may_claim_what_was_only_reserved(store: Store) -> None:
    world.register(store, "cpu0@a")
    attempt = world.send(store, world.submit(store), ("cpu0@a", "cpu"))
    new = world.register(store, "cpu0@a")
    world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", new)


@pytest.mark.parametrize("leave", [drain_device, end_worker])
def test_what_a_leaving_device_has_not_begun_goes_elsewhere_at_once(
    store: Store, leave: object
) -> None:
    worker = world.register(store, "cpu0@a")
    job_id = world.submit(store, retry={"max_attempts": 1})
    world.send(store, job_id, ("cpu0@a", "cpu"))
    assert store.call(leave, worker)  # type: ignore[arg-type]
    assert state(store, job_id) == JobState.QUEUED, "it costs no try"
    (device,) = store.call(take_snapshot, 60).devices
    assert (device.live, device.busy) == (False, False)
    assert device.known == (leave is drain_device)


def test_a_draining_device_ends_its_work_and_takes_no_more(store: Store) -> None:
    job_id, claimed = gang(store)
    assert store.call(drain_device, claimed[0].holder.worker_id)
    for rank in claimed:
        assert store.call(renew_lease, rank.holder, 60).answer is Answer.GO_ON
        assert store.call(finish_rank, rank.holder, {})
    assert state(store, job_id) == JobState.SUCCEEDED
    other = world.submit(store)
    placed = [Placed("cpu0@a", "cpu")]
    kw = {"label": "x", "claim_timeout": 60.0, "device_timeout": 60.0, "reason": "x"}
    term = world.become_leader(store)
    assert store.call(dispatch_attempt, term, other, placed, **kw) is None  # type: ignore[arg-type]


def test_a_job_that_can_never_run_fails_once(store: Store) -> None:
    job_id = world.submit(store)
    assert store.call(fail_queued_job, job_id, "unsatisfiable", "never", None)
    assert not store.call(fail_queued_job, job_id, "unsatisfiable", "never", None)
    assert state(store, job_id) == JobState.FAILED


def test_one_leads_and_the_term_rises(store: Store) -> None:
    assert store.call(lead, "one", 60) == 1
    assert store.call(lead, "one", 60) == 1
    assert store.call(lead, "two", 60) is None
    store.call(resign, "two")
    assert store.call(leads, 1), "only the leader can resign"
    store.call(resign, "one")
    assert not store.call(leads, 1)
    assert store.call(lead, "two", 60) == 2
    assert not store.call(leads, 1)
    with store.transaction() as session:
        session.execute(text("UPDATE leader SET expires_at = now() - interval '1 s'"))
    assert not store.call(leads, 2), "a leader whose lease ran out decides nothing"
    assert store.call(lead, "one", 60) == 3
