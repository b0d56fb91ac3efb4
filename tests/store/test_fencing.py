"""Fencing: a write of a worker that lost its right changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import text

from shared.messages import FileDigest
from shared.rows import result
from shared.store import Holder, Store
from shared.store.claim import Answer, publish_rendezvous, renew_lease
from shared.store.finish import fail_rank, finish_rank, leave_attempt, release_lease
from shared.store.ledger import commit_shard, lease_shards, record_deaths, split_shard
from shared.store.report import (
    append_log,
    commit_checkpoint,
    forget_checkpoints,
    record_artifact,
    record_event,
    record_metric,
    record_progress,
)
from shared.store.rescue import expired_leases, rescue_lease
from tests.store import world

MANIFEST = {"state": FileDigest(size=1, sha256="0" * 64)}
ROWS = [result(i, output={"text": "x"}) for i in range(2)]
SHA = "0" * 64
WRITES: dict[str, Callable[[Store, Holder], object]] = {
    "event": lambda s, h: s.call(record_event, h, "note", "text"),
    "progress": lambda s, h: s.call(record_progress, h, {"step": 1}),
    "metric": lambda s, h: s.call(record_metric, h, "train", 1, {"loss": 1.0}),
    "log": lambda s, h: s.call(append_log, h, "text"),
    "checkpoint": lambda s, h: s.call(commit_checkpoint, h, 1, "p", MANIFEST),
    "newer checkpoint": lambda s, h: s.call(commit_checkpoint, h, 2, "q", MANIFEST),
    "forget": lambda s, h: s.call(forget_checkpoints, h, 1),
    "artifact": lambda s, h: s.call(
        record_artifact, h, name="m", kind="file", path="p", size=1, sha256=SHA
    ),
    "lease": lambda s, h: s.call(lease_shards, h, 2, idle=True),
    "split": lambda s, h: s.call(split_shard, h, 1, 3, 30, "it died"),
    "deaths": lambda s, h: s.call(record_deaths, h, [0], "it died"),
    "shard": lambda s, h: s.call(commit_shard, h, 0, ROWS, 0.1),
    "rendezvous": lambda s, h: s.call(publish_rendezvous, h, "host:1"),
    "finish": lambda s, h: s.call(finish_rank, h, {}),
    "fail": lambda s, h: s.call(fail_rank, h, world.failure()),
    "leave": lambda s, h: s.call(leave_attempt, h),
}


def running(store: Store) -> Holder:
    worker = world.register(store, "cpu0@a")
    attempt = world.send(store, world.submit(store, shards=2), ("cpu0@a", "cpu"))
    return world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", worker).holder


def rescued(store: Store) -> Holder:
    holder = running(store)
    with store.transaction() as session:
        session.execute(text("UPDATE leases SET expires_at = now() - interval '1 hour'"))
    term = world.become_leader(store)
    for lost in store.call(expired_leases).leases:
        assert store.call(rescue_lease, term, lost)
    return holder


def other_worker(store: Store) -> Holder:
    return replace(running(store), worker_id="wrk_another")


def wrong_token(store: Store) -> Holder:
    return replace(running(store), token=2)


def older_attempt(store: Store) -> Holder:
    """The job runs again, on the same device and by the same worker."""
    holder = running(store)
    assert store.call(fail_rank, holder, world.failure())
    attempt = world.send(store, holder.job_id, ("cpu0@a", "cpu"))
    world.claim(store, world.hints(store, attempt.id)[0], "cpu0@a", holder.worker_id)
    return holder


def restarted_worker(store: Store) -> Holder:
    holder = running(store)
    world.register(store, "cpu0@a")
    return holder


@pytest.mark.parametrize(
    "how", [rescued, other_worker, wrong_token, older_attempt, restarted_worker]
)
def test_no_stale_write_changes_anything(store: Store, how: Callable[[Store], Holder]) -> None:
    stale = how(store)
    before = world.contents(store)
    for name, write in WRITES.items():
        assert write(store, stale) in (False, None), name
        assert world.contents(store) == before, name
    assert store.call(renew_lease, stale, 60).answer is Answer.STOP
    assert not store.call(release_lease, stale)
    assert world.contents(store) == before


def test_the_same_writes_of_the_holder_count(store: Store) -> None:
    """Without this the test above could not fail."""
    holder = running(store)
    for name, write in WRITES.items():
        if name in ("finish", "fail", "leave"):
            continue
        before = world.contents(store)
        assert write(store, holder) not in (False, None), name
        assert world.contents(store) != before, name
    assert store.call(renew_lease, holder, 60).answer is Answer.GO_ON
    assert store.call(fail_rank, holder, world.failure())


def test_a_shard_counts_once_and_stays_as_it_was(store: Store) -> None:
    holder = running(store)
    assert store.call(commit_shard, holder, 0, ROWS, 0.1)
    first = world.contents(store)["shards"]
    other = [result(i, output={"text": "other"}) for i in range(2)]
    assert store.call(commit_shard, holder, 0, other, 0.2)  # the repeat of an unanswered call
    assert world.contents(store)["shards"] == first


def test_a_shard_of_other_size_is_a_defect_and_not_dropped(store: Store) -> None:
    holder = running(store)
    with pytest.raises(AssertionError, match="no shard 0 of 1 rows"):
        store.call(commit_shard, holder, 0, ROWS[:1], 0.1)
    with pytest.raises(AssertionError, match="no shard 9"):
        store.call(commit_shard, holder, 9, ROWS, 0.1)


def test_a_checkpoint_is_told_once(store: Store) -> None:
    holder = running(store)
    for _ in range(2):
        assert store.call(commit_checkpoint, holder, 5, "p", MANIFEST)
    contents = world.contents(store)
    assert len(contents["checkpoints"]) == 1
    assert [e["type"] for e in contents["events"]].count("checkpoint") == 1


def test_a_lease_that_ran_out_and_nobody_took_is_renewed(store: Store) -> None:
    holder = running(store)
    with store.transaction() as session:
        session.execute(text("UPDATE leases SET expires_at = now() - interval '1 hour'"))
    (lost,) = store.call(expired_leases).leases
    assert store.call(renew_lease, holder, 60).answer is Answer.GO_ON
    assert not store.call(rescue_lease, world.become_leader(store), lost)


def test_what_json_cannot_say_does_not_break_a_report(store: Store) -> None:
    """A diverged loss and a NUL in what a library printed are reported, not refused by Postgres."""
    holder = running(store)
    nan, nul = float("nan"), "a\x00b"
    assert store.call(record_progress, holder, {"step": 1, "loss": nan})
    assert store.call(record_metric, holder, "train", 1, {"loss": nan, "accuracy": 0.5})
    assert store.call(record_event, holder, "note", nul, {"x": [nan, nul]})
    assert store.call(append_log, holder, nul)
    contents = world.contents(store)
    assert contents["metrics"][0]["values"] == {"accuracy": 0.5}
    assert contents["jobs"][0]["progress"]["loss"] is None
    failure = replace(world.failure(), message=nul, hint=nul)
    assert store.call(fail_rank, holder, failure)
    assert world.contents(store)["attempts"][0]["failure"]["message"] == "a\ufffdb"


def test_an_old_leader_rescues_nothing(store: Store) -> None:
    running(store)
    with store.transaction() as session:
        session.execute(text("UPDATE leases SET expires_at = now() - interval '1 hour'"))
        session.execute(text("UPDATE leader SET expires_at = now() - interval '1 hour'"))
    (lost,) = store.call(expired_leases).leases
    new = world.become_leader(store, "another")
    before = world.contents(store)
    assert not store.call(rescue_lease, new - 1, lost)
    assert world.contents(store) == before
    assert store.call(rescue_lease, new, lost)
