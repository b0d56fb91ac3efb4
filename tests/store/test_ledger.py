"""The row ledger: shards are leased by ranks that come and go, and every row is delivered once."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from shared.lifecycle import AttemptState, FailureClass, JobState
from shared.rows import cut_into_shards, find_row, read_lines, result
from shared.store import Holder, Store, read
from shared.store.batches import batch_work, running_batches
from shared.store.cancel import cancel_job
from shared.store.claim import Answer, renew_lease
from shared.store.devices import drain_device
from shared.store.dispatch import Placed
from shared.store.finish import (
    RowsLeft,
    fail_rank,
    finish_rank,
    leave_attempt,
    release_lease,
)
from shared.store.growth import Running, ask_back_rank, grow_attempt
from shared.store.ledger import (
    LeasedShard,
    commit_shard,
    lease_shards,
    record_deaths,
    row_totals,
    split_shard,
)
from shared.store.report import record_progress
from shared.store.rescue import expired_leases, rescue_lease
from shared.tables import Shard
from tests.store import world


class Batch:
    """A batch job of shards of two rows each, on ranks that a test adds."""

    def __init__(self, store: Store, shards: int, ranks: int = 1, **spec: object) -> None:
        self.store = store
        self.term = world.become_leader(store)
        self.workers = [world.register(store, "cpu0@a")]
        self.id = world.submit(store, shards=shards, **spec)
        attempt = world.send(store, self.id, ("cpu0@a", "cpu"), term=self.term)
        self.running = Running(self.id, attempt.id, attempt.token)
        hint = world.hints(store, attempt.id)[0]
        self.claimed = [world.claim(store, hint, "cpu0@a", self.workers[0])]
        for _ in range(ranks - 1):
            self.grow()

    def reserve(self, most: int | None = None) -> int | None:
        device = f"cpu{len(self.workers)}@a"
        self.workers.append(world.register(self.store, device))
        return self.store.call(
            grow_attempt, self.term, self.running, Placed(device, "cpu"),
            label="infer:tiny", most=most, claim_timeout=60, device_timeout=60, reason="test",
        )  # fmt: skip

    def grow(self) -> Holder:
        rank = self.reserve()
        assert rank is not None
        device, worker = f"cpu{len(self.workers) - 1}@a", self.workers[-1]
        [hint] = [h for h in world.hints(self.store, self.running.attempt_id) if h.rank == rank]
        self.claimed.append(world.claim(self.store, hint, device, worker))
        return self.holders[-1]

    @property
    def holders(self) -> list[Holder]:
        return [each.holder for each in self.claimed]

    def lease(self, rank: int, count: int = 2, having: tuple[int, ...] = ()) -> list[int]:
        return [each.shard.index for each in self.leased(rank, count, having)]

    def leased(self, rank: int, count: int, having: tuple[int, ...] = ()) -> list[LeasedShard]:
        idle = not having
        found = self.store.call(lease_shards, self.holders[rank], count, having, idle=idle)
        assert found is not None
        return found

    def compute(self, rank: int, index: int) -> bool:
        shard = self.store.call(lambda s: s.get(Shard, (self.id, index)))
        assert shard is not None
        rows = range(shard.first_row, shard.first_row + shard.rows)
        results = [result(row, output={"text": str(rank)}) for row in rows]
        return self.store.call(commit_shard, self.holders[rank], index, results, 0.1)

    def rescue(self, rank: int) -> None:
        """The lease of a rank runs out, and the scheduler sees it."""
        with self.store.transaction() as session:
            session.execute(
                text(
                    "UPDATE leases SET expires_at = now() - interval '1 hour'"
                    " WHERE attempt_id = :attempt AND rank = :rank"
                ),
                {"attempt": self.running.attempt_id, "rank": rank},
            )
        (lost,) = self.store.call(expired_leases).leases
        assert self.store.call(rescue_lease, self.term, lost)

    @property
    def state(self) -> str:
        return world.job_of(self.store, self.id).state

    def told(self) -> list[str]:
        return [event.type for event in self.store.call(read.events_after, self.id, 0, 1000)]


def test_ranks_share_the_shards_in_input_order(store: Store) -> None:
    batch = Batch(store, 5, ranks=2)
    assert batch.lease(0) == [0, 1]
    assert batch.lease(1) == [2, 3]
    assert batch.lease(0, having=(0, 1)) == [4]
    assert batch.lease(1, having=(2, 3)) == []
    for rank, index in [(0, 0), (0, 1), (1, 2), (1, 3)]:
        assert batch.compute(rank, index)
    assert store.call(finish_rank, batch.holders[1], {"compute_seconds": 1.5}), "its device is free"
    assert batch.state == JobState.RUNNING
    assert batch.compute(0, 4)
    assert store.call(finish_rank, batch.holders[0], {"compute_seconds": 2.0})
    job = world.job_of(store, batch.id)
    assert job.state == JobState.SUCCEEDED and job.summary is not None
    assert job.summary.pop("device_seconds") > 0
    assert job.summary == {"compute_seconds": 3.5, **store.call(row_totals, batch.id)}
    assert "rank_left" in batch.told()


def test_what_a_lost_answer_had_leased_is_open_to_the_same_rank(store: Store) -> None:
    batch = Batch(store, 4, ranks=2)
    assert batch.lease(0) == [0, 1]
    assert batch.lease(0) == [0, 1], "the first answer never came"
    assert batch.lease(1) == [2, 3]
    assert batch.lease(0, having=(0,)) == [1]


def test_what_a_lost_rank_had_leased_is_open_and_what_it_commits_is_refused(store: Store) -> None:
    batch = Batch(store, 4, ranks=2)
    assert batch.lease(1) == [0, 1]
    assert batch.compute(1, 0)
    batch.rescue(1)
    assert batch.state == JobState.RUNNING
    assert not batch.compute(1, 1), "it was taken for lost"
    assert store.call(lease_shards, batch.holders[1], 1, idle=True) is None
    assert batch.lease(0, 8) == [1, 2, 3]
    for index in (1, 2, 3):
        assert batch.compute(0, index)
    assert store.call(finish_rank, batch.holders[0], {})
    assert batch.state == JobState.SUCCEEDED
    owners = {s.index: s.results for s in store.call(read.committed_shards, batch.id)}
    assert len(owners) == 4
    assert batch.told().count("rank_lost") == 1


def test_the_last_rank_is_told_to_go_on_where_rows_are_open_again(store: Store) -> None:
    batch = Batch(store, 2, ranks=2)
    assert batch.lease(1) == [0, 1]
    assert batch.lease(0) == []
    batch.rescue(1)
    before = world.contents(store)
    with pytest.raises(RowsLeft):
        store.call(finish_rank, batch.holders[0], {})
    assert world.contents(store) == before
    assert batch.lease(0) == [0, 1]


def test_the_loss_of_the_last_rank_ends_the_attempt(store: Store) -> None:
    batch = Batch(store, 2)
    assert batch.reserve() == 1
    batch.rescue(0)
    assert batch.state == JobState.QUEUED
    (attempt,) = store.call(read.list_attempts, batch.id)
    assert (attempt.state, attempt.failure_class) == (AttemptState.LOST, "lost_worker")
    leases = store.call(read.list_leases, [attempt.id])
    assert {lease.state for lease in leases} == {"released"}


def test_the_loss_of_the_last_rank_after_the_last_row_costs_nothing(store: Store) -> None:
    batch = Batch(store, 1)
    assert batch.compute(0, 0)
    batch.rescue(0)
    assert batch.state == JobState.SUCCEEDED


def test_a_rank_that_nobody_claims_costs_nothing(store: Store) -> None:
    batch = Batch(store, 2)
    assert batch.reserve() == 1
    batch.rescue(1)
    assert batch.state == JobState.RUNNING
    assert batch.told()[-1] == "rank_unclaimed"
    assert world.hints(store, batch.running.attempt_id) == []
    assert batch.reserve() == 2, "a number is given once"


def test_a_reserved_rank_is_released_with_success(store: Store) -> None:
    batch = Batch(store, 1)
    assert batch.reserve() == 1
    assert batch.compute(0, 0)
    assert store.call(finish_rank, batch.holders[0], {})
    assert batch.state == JobState.SUCCEEDED
    assert world.hints(store, batch.running.attempt_id) == []


def test_a_rank_that_comes_later_knows_how_long_the_attempt_runs(store: Store) -> None:
    batch = Batch(store, 2)
    assert batch.claimed[0].seconds_running == 0
    with store.transaction() as session:
        session.execute(text("UPDATE attempts SET started_at = started_at - interval '1 hour'"))
    batch.grow()
    assert batch.claimed[1].seconds_running >= 3600
    assert batch.claimed[1].world_size == 2


def test_growth_has_limits(store: Store) -> None:
    batch = Batch(store, 3)
    assert batch.reserve(most=1) is None
    assert batch.reserve(most=2) == 1
    old = Running(batch.id, batch.running.attempt_id, batch.running.token - 1)
    where = Placed("cpu1@a", "cpu")
    options = {"label": "x", "most": None, "claim_timeout": 60, "device_timeout": 60}
    for running, term in [(old, batch.term), (batch.running, batch.term - 1)]:
        assert store.call(grow_attempt, term, running, where, reason="", **options) is None
    store.call(cancel_job, batch.id, "enough")
    assert store.call(grow_attempt, batch.term, batch.running, where, reason="", **options) is None


def test_a_device_that_was_taken_is_not_given(store: Store) -> None:
    batch = Batch(store, 3)
    taken = Placed("cpu0@a", "cpu")
    options = {"label": "x", "most": None, "claim_timeout": 60, "device_timeout": 60}
    got = store.call(grow_attempt, batch.term, batch.running, taken, reason="", **options)
    assert got is None


def test_a_rank_that_is_asked_back_leaves_and_the_others_go_on(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert store.call(ask_back_rank, batch.term, batch.running, 1, "a training waits")
    assert not store.call(ask_back_rank, batch.term, batch.running, 1, "again")
    assert store.call(renew_lease, batch.holders[1], 60).answer is Answer.LEAVE
    assert store.call(renew_lease, batch.holders[0], 60).answer is Answer.GO_ON
    assert not store.call(ask_back_rank, batch.term, batch.running, 0, "not the last one")
    assert store.call(finish_rank, batch.holders[1], {}), "with rows open, as rank 0 goes on"
    assert batch.state == JobState.RUNNING


def test_a_rank_that_is_asked_back_goes_on_when_it_is_the_last(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert store.call(ask_back_rank, batch.term, batch.running, 1, "a training waits")
    batch.rescue(0)
    assert store.call(renew_lease, batch.holders[1], 60).answer is Answer.GO_ON


def test_a_reserved_rank_is_taken_back_at_once(store: Store) -> None:
    batch = Batch(store, 3)
    assert batch.reserve() == 1
    assert store.call(ask_back_rank, batch.term, batch.running, 1, "a training waits")
    leases = store.call(read.list_leases, [batch.running.attempt_id])
    assert [lease.state for lease in leases] == ["held", "released"]
    assert world.hints(store, batch.running.attempt_id) == []


def test_a_drained_worker_leaves_if_others_go_on(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert store.call(drain_device, batch.workers[0])
    assert store.call(renew_lease, batch.holders[0], 60).answer is Answer.LEAVE
    assert store.call(drain_device, batch.workers[1])
    for holder in batch.holders:
        assert store.call(renew_lease, holder, 60).answer is Answer.GO_ON
    preempted = world.failure(FailureClass.PREEMPTED)
    assert store.call(fail_rank, batch.holders[0], preempted)
    assert batch.state == JobState.RUNNING
    assert store.call(fail_rank, batch.holders[1], preempted)
    assert batch.state == JobState.QUEUED


def test_a_rank_given_up_by_its_worker_is_a_rank_less(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert store.call(release_lease, batch.holders[0])
    assert batch.state == JobState.RUNNING
    assert store.call(release_lease, batch.holders[1])
    assert batch.state == JobState.QUEUED


def test_a_device_that_fails_costs_the_job_only_that_device(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert batch.lease(1) == [0, 1]
    assert store.call(fail_rank, batch.holders[1], world.failure(FailureClass.LOST_DEVICE))
    assert (batch.state, batch.told()[-1]) == (JobState.RUNNING, "rank_lost")
    assert batch.lease(0, 3) == [0, 1, 2]
    assert store.call(fail_rank, batch.holders[0], world.failure(FailureClass.LOST_DEVICE))
    assert batch.state == JobState.QUEUED


def test_an_error_in_the_data_found_by_one_rank_is_that_of_the_job(store: Store) -> None:
    batch = Batch(store, 3, ranks=2)
    assert store.call(fail_rank, batch.holders[1], world.failure(FailureClass.DATA_ERROR))
    assert batch.state == JobState.FAILED
    assert store.call(renew_lease, batch.holders[0], 60).answer is Answer.STOP


def test_cancel_waits_for_all_ranks_and_keeps_what_is_committed(store: Store) -> None:
    batch = Batch(store, 3, ranks=3)
    assert batch.reserve() == 3
    assert batch.compute(0, 0)
    store.call(cancel_job, batch.id, "enough")
    assert store.call(leave_attempt, batch.holders[0])
    assert store.call(finish_rank, batch.holders[1], {}), "it was just leaving"
    assert batch.state == JobState.CANCELLING
    batch.rescue(2)
    assert batch.state == JobState.CANCELLED
    assert len(store.call(read.committed_shards, batch.id)) == 1


def test_deaths_are_counted_once_and_the_shard_is_computed_alone(store: Store) -> None:
    batch = Batch(store, 4, ranks=2)
    assert batch.lease(0, 3) == [0, 1, 2]
    assert store.call(record_deaths, batch.holders[0], [0, 1], "the engine was ended by SIGSEGV")
    assert store.call(record_deaths, batch.holders[0], [0, 1], "a repeat"), "its answer was lost"
    assert batch.told().count("engine_died") == 1
    assert batch.lease(1, 4, having=(9,)) == [3], "not beside others"
    [alone] = batch.leased(1, 4)
    assert (alone.shard.index, alone.deaths) == (0, 1)
    [other] = batch.leased(0, 4, having=())
    assert (other.shard.index, other.deaths) == (1, 1)


def test_a_shard_is_split_in_place(store: Store) -> None:
    batch = Batch(store, 3)
    assert batch.lease(0, 3) == [0, 1, 2]
    cut = (1, 3, 30, "the engine was ended by SIGSEGV")
    assert store.call(split_shard, batch.holders[0], *cut)
    assert store.call(split_shard, batch.holders[0], *cut), "its answer was lost"
    rows = [result(2 + i, output={"text": "x"}) for i in range(2)]
    assert store.call(commit_shard, batch.holders[0], 1, rows, 0.1), "its halves are computed"
    assert store.call(row_totals, batch.id)["done"] == 0
    for index in (0, 2):
        assert batch.compute(0, index)
    first, second = batch.leased(0, 1)[0], batch.leased(0, 1, having=())[0]
    assert (first.shard.index, first.shard.first_row, first.shard.rows, first.deaths) == (
        3,
        2,
        1,
        1,
    )
    assert (first.shard.offset, first.shard.length) == (20, 10)
    assert second == first, "alone, until it is done"
    assert batch.compute(0, 3)
    [last] = batch.leased(0, 1)
    assert (last.shard.index, last.shard.offset, last.shard.length) == (4, 30, 10)
    assert batch.compute(0, 4)
    assert store.call(finish_rank, batch.holders[0], {})
    found = store.call(read.committed_shards, batch.id)
    assert [shard.first_row for shard in found] == [0, 2, 3, 4]


def test_a_cut_outside_of_the_shard_is_a_defect(store: Store) -> None:
    batch = Batch(store, 2)
    batch.lease(0, 2)
    before = world.contents(store)
    for row, offset in [(0, 10), (2, 10), (1, 20), (1, 0)]:
        with pytest.raises(AssertionError, match="is not cut"):
            store.call(split_shard, batch.holders[0], 0, row, offset, "x")
    assert world.contents(store) == before


def test_progress_of_several_ranks_never_goes_back(store: Store) -> None:
    batch = Batch(store, 4, ranks=2)
    for rank, step in [(0, 3), (1, 2), (0, 4)]:
        assert store.call(record_progress, batch.holders[rank], {"step": step, "total_steps": 8})
    job = world.job_of(store, batch.id)
    assert job.progress is not None
    assert job.progress["step"] == 4
    assert store.call(record_progress, batch.holders[1], {"step": 3, "total_steps": 8})
    job = world.job_of(store, batch.id)
    assert job.progress is not None
    assert job.progress["step"] == 4


def test_rows_are_read_from_any_row_on(store: Store) -> None:
    batch = Batch(store, 4)
    for index in (0, 1, 3):
        assert batch.compute(0, index)

    def first_rows(after_row: int) -> list[int]:
        return [s.first_row for s in store.call(read.committed_shards, batch.id, after_row)]

    assert [first_rows(row) for row in (-1, 0, 1, 3, 5, 6, 7)] == [
        [0, 2, 6], [0, 2, 6], [2, 6], [6], [6], [6], [],
    ]  # fmt: skip


def test_what_the_scheduler_sees_of_running_batches(store: Store) -> None:
    batch = Batch(store, 6, ranks=2, priority=3)
    world.submit(store, shards=2)  # waits
    assert batch.reserve() == 2
    assert batch.lease(0) == [0, 1]
    assert batch.lease(1) == [2, 3]
    assert batch.compute(0, 0)
    assert store.call(ask_back_rank, batch.term, batch.running, 1, "test")
    [seen] = store.call(running_batches)
    assert seen.running == batch.running
    assert (seen.priority, seen.model, seen.label) == (3, "tiny", "infer:tiny")
    assert 0 <= seen.seconds_running < 3600
    ranks = [(r.rank, r.device_id, r.held, r.asked_back) for r in seen.ranks]
    assert ranks == [
        (0, "cpu0@a", True, False), (1, "cpu1@a", True, True), (2, "cpu2@a", False, False),
    ]  # fmt: skip
    work = store.call(batch_work, [batch.id])[batch.id]
    assert (work.unleased, work.rows_left, work.rows_done) == (2, 10, 2)
    batch.rescue(1)
    assert store.call(batch_work, [batch.id])[batch.id].unleased == 4
    [seen] = store.call(running_batches)
    assert ([r.rank for r in seen.ranks], seen.lost) == ([0, 2], ("cpu1@a",))


def test_a_row_is_found_in_its_shard(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\n{"a": 1}\n\n  \n{"a": 2}\n{"a": "\xc3\xa4"}\n\n{"a": 4}')
    first, second = cut_into_shards(file, 3)
    data = file.read_bytes()
    for shard in (first, second):
        for row, line in read_lines(file, shard):
            offset = find_row(file, shard, row)
            assert data[offset:].lstrip().startswith(line)
            assert b"{" not in data[shard.offset : offset].rpartition(b"}")[2]
    with pytest.raises(ValueError, match="was changed"):
        find_row(file, second, 4)
