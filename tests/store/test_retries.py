"""When a job is tried again: at once after a first failure, later and later while it gets no further."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text

from scheduler.admission import admit
from shared.lifecycle import FailureClass
from shared.messages import FileDigest
from shared.store import Holder, Store
from shared.store.finish import fail_rank
from shared.store.ledger import commit_shard
from shared.store.read import events_after
from shared.store.report import commit_checkpoint, forget_checkpoints
from shared.store.rescue import expired_leases, rescue_lease
from shared.store.snapshot import take_snapshot
from tests.store import world

MANIFEST = {"state": FileDigest(size=1, sha256="0" * 64)}
RETRY = {"max_attempts": 10, "backoff_seconds": 8}
ROWS = [{"error": None, "usage": {"input_tokens": 1, "output_tokens": 1}}] * 2
Work = Callable[[Holder], object]


class Tries:
    """A job on one device that fails, attempt after attempt."""

    def __init__(self, store: Store, shards: int = 0) -> None:
        self.store = store
        self.worker = world.register(store, "cpu0@a")
        self.job = world.submit(store, shards=shards, retry=RETRY)

    def begin(self) -> Holder:
        """Claim the next attempt, whatever it should have waited."""
        attempt = world.send(self.store, self.job, ("cpu0@a", "cpu"))
        (hint,) = world.hints(self.store, attempt.id)
        return world.claim(self.store, hint, "cpu0@a", self.worker).holder

    def fail(self, *work: Work, failure_class: FailureClass = FailureClass.INFRASTRUCTURE) -> float:
        """An attempt does this work and fails: the seconds that its retry says it waits."""
        holder = self.begin()
        for act in work:
            assert act(holder)
        assert self.store.call(fail_rank, holder, world.failure(failure_class))
        return self.waits()

    def waits(self) -> float:
        retry = [e for e in self.store.call(events_after, self.job, 0) if e.type == "retry"][-1]
        seconds = float(retry.data["after_seconds"])
        assert retry.message.endswith(f"again in {seconds:g} s" if seconds else "again at once")
        assert self.admitted() == (seconds == 0), "admission goes by what the retry says"
        return seconds

    def admitted(self) -> bool:
        snapshot = self.store.call(take_snapshot, 60)
        return self.job in {job.id for job in admit(snapshot.jobs, snapshot.now).ready}

    def saves(self, step: int) -> Work:
        return lambda holder: self.store.call(
            commit_checkpoint, holder, step, f"{holder.token}/{step}", MANIFEST, None
        )

    def keeps_the_newest(self) -> Work:
        return lambda holder: self.store.call(forget_checkpoints, holder, 1) is not None

    def commits(self, shard: int) -> Work:
        return lambda holder: self.store.call(commit_shard, holder, shard, ROWS, 0.1)


@pytest.mark.parametrize(
    "failure_class",
    [FailureClass.INFRASTRUCTURE, FailureClass.LOST_DEVICE, FailureClass.LOST_WORKER],
)
def test_a_first_failure_is_tried_again_at_once(store: Store, failure_class: FailureClass) -> None:
    assert Tries(store).fail(failure_class=failure_class) == 0


def test_a_device_that_ends_every_attempt_does_not_make_the_job_spin(store: Store) -> None:
    tries = Tries(store)
    assert [tries.fail() for _ in range(5)] == [0, 8, 16, 32, 64]


def test_a_further_checkpoint_makes_the_next_failure_a_first_one(store: Store) -> None:
    tries = Tries(store)
    assert [tries.fail(tries.saves(5)), tries.fail(), tries.fail()] == [0, 8, 16]
    assert tries.fail(tries.saves(10)) == 0
    assert [tries.fail(tries.saves(step)) for step in (15, 20, 25)] == [0, 0, 0]
    assert tries.fail() == 8


def test_a_checkpoint_that_was_there_before_is_no_progress(store: Store) -> None:
    """As where the newest one is damaged: each attempt begins further back and saves it again."""
    tries = Tries(store)
    tries.fail(tries.saves(5), tries.saves(10), tries.keeps_the_newest())
    assert tries.fail(tries.saves(5), tries.saves(10)) == 8
    assert tries.fail(tries.saves(10), tries.keeps_the_newest()) == 16
    assert tries.fail(tries.saves(11)) == 0


def test_results_of_a_batch_job_are_progress(store: Store) -> None:
    tries = Tries(store, shards=3)
    assert [tries.fail(), tries.fail()] == [0, 8]
    assert tries.fail(tries.commits(0)) == 0
    assert tries.fail() == 8


def test_a_rescued_attempt_is_tried_again_at_once_and_then_waits(store: Store) -> None:
    tries = Tries(store)
    waited = []
    for _ in range(2):
        tries.begin()
        with store.transaction() as session:
            session.execute(text("UPDATE leases SET expires_at = now() - interval '1 s'"))
        (lost,) = store.call(expired_leases).leases
        assert store.call(rescue_lease, world.become_leader(store), lost)
        waited.append(tries.waits())
    assert waited == [0, 8]
