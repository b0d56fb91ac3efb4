"""The jobs of a store on their way, and the promises that every call has to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from hypothesis.stateful import RuleBasedStateMachine, invariant

from shared.lifecycle import (
    AttemptState,
    JobState,
    LeaseState,
    attempt_may_become,
    job_may_become,
)
from shared.messages import Hint
from shared.rows import result
from shared.store import Holder, Store
from shared.store.finish import finish_rank
from shared.store.growth import Running
from shared.store.ledger import commit_shard, lease_shards
from shared.store.rescue import ExpiredLease, expired_leases, rescue_lease
from tests.store import world

DEVICES = ("cpu0@a", "cpu1@a")
ENDS = ("succeeded", "failed", "cancelled")


class Lives(RuleBasedStateMachine):
    """What random lives start from, look at, and have to keep. A subclass adds what happens."""

    def __init__(self, store: Store, connection: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.store, self.connection = store, connection
        connection.execute("TRUNCATE jobs, devices, workers, leader CASCADE")
        self.workers = {device: world.register(store, device) for device in DEVICES}
        self.old_workers: list[tuple[str, str]] = []
        self.terms = [world.become_leader(store)]
        self.jobs: list[str] = []
        self.hints: list[Hint] = []
        self.holders: list[Holder] = []
        self.expired: list[ExpiredLease] = []
        self.before = self.look()
        """As it was after the last call."""

    # --- what must hold ------------------------------------------------------------------------

    @invariant()
    def promises_are_kept(self) -> None:
        before, now = self.before, self.look()
        self.before = now
        check_transitions(before, now)
        check_rows(now)

    def teardown(self) -> None:
        """However it stands: every job can still be brought to an end."""
        for device in DEVICES:
            self.workers[device] = world.register(self.store, device)  # ends what it held
            self.promises_are_kept()
        self.connection.execute("UPDATE leases SET expires_at = now() - interval '1 hour'")
        while lost := self.store.call(expired_leases).leases:  # one may end with another
            assert self.store.call(rescue_lease, self.terms[-1], lost[0])
            self.promises_are_kept()
        for job_id in self.jobs:
            if not JobState(self.job(job_id)["state"]).terminal:
                self.run_to_the_end(job_id)
                self.promises_are_kept()
                assert self.job(job_id)["state"] == JobState.SUCCEEDED
        for job in self.before["jobs"]:
            mine = [s for s in self.before["shards"] if s["job_id"] == job["id"]]
            rows = [row for s in mine for row in range(s["first_row"], s["first_row"] + s["rows"])]
            assert sorted(rows) == list(range(len(rows))), "a row is in one shard"
            assert len(rows) == (4 if job["kind"] == "infer" else 0)

    def run_to_the_end(self, job_id: str) -> None:
        count = int(self.job(job_id)["resolved"]["requirements"]["devices"])
        attempt = world.send(
            self.store, job_id, *((d, "cpu") for d in DEVICES[:count]), term=self.terms[-1]
        )
        self.promises_are_kept()
        for hint, device in zip(world.hints(self.store, attempt.id), DEVICES, strict=False):
            holder = world.claim(self.store, hint, device, self.workers[device]).holder
            self.promises_are_kept()
            while found := self.store.call(lease_shards, holder, 8, idle=True):
                for each in found:
                    self.promises_are_kept()
                    assert self.commit(holder, self.shard_of(job_id, each.shard.index))
            assert self.store.call(finish_rank, holder, {})

    # --- looking -------------------------------------------------------------------------------

    def write(self, n: int, call: Callable[[Holder], bool]) -> None:
        """A worker's write: counts exactly if its holder is current, else changes nothing."""
        holder = self.holder(n)
        current = self.is_current(holder)
        assert call(holder) == current
        assert current or self.nothing_changed(), "a stale write changed something"

    def commit(self, holder: Holder, shard: dict[str, Any]) -> bool:
        rows = range(shard["first_row"], shard["first_row"] + shard["rows"])
        results = [result(row, output={"text": holder.attempt_id}) for row in rows]
        return self.store.call(commit_shard, holder, shard["index"], results, 0.1)

    def shard_of(self, job_id: str, index: int) -> dict[str, Any]:
        shards = self.before["shards"]
        return next(s for s in shards if (s["job_id"], s["index"]) == (job_id, index))

    def leased(self, holder: Holder) -> list[dict[str, Any]]:
        """What the rank is to compute."""
        return [
            s
            for s in self.before["shards"]
            if s["job_id"] == holder.job_id
            and not s["committed_at"]
            and (s["leased_token"], s["leased_rank"]) == (holder.token, holder.rank)
        ]

    def others(self, holder: Holder) -> list[dict[str, Any]]:
        """Leases of the attempt's other ranks that are held."""
        return [
            lease
            for lease in self.before["leases"]
            if lease["attempt_id"] == holder.attempt_id
            and lease["rank"] != holder.rank
            and lease["state"] == LeaseState.HELD
        ]

    def running(self, n: int) -> Running | None:
        """An attempt at a batch job, one that runs most of the time."""
        batches = {job["id"] for job in self.before["jobs"] if job["kind"] == "infer"}
        attempts = [a for a in self.before["attempts"] if a["job_id"] in batches]
        active = [a for a in attempts if a["state"] == AttemptState.RUNNING]
        some = active if active and n % 4 else attempts
        if not some:
            return None
        attempt = some[n // 4 % len(some)]
        return Running(attempt["job_id"], attempt["id"], attempt["token"])

    def holder(self, n: int) -> Holder:
        """A current one most of the time, else any: most of those are stale."""
        current = [holder for holder in self.holders if self.is_current(holder)]
        few = current if current and n % 3 else self.holders
        return few[n // 3 % len(few)]

    def is_current(self, holder: Holder) -> bool:
        """The fencing rule, said a second time and independently of the store."""
        job, lease = self.job(holder.job_id), self.lease(holder, self.before)
        attempt = next(a for a in self.before["attempts"] if a["id"] == holder.attempt_id)
        return (
            job["token"] == attempt["token"] == holder.token
            and attempt["state"] in ("dispatched", "running")
            and (lease["state"], lease["worker_id"]) == ("held", holder.worker_id)
        )

    def job(self, job_id: str) -> dict[str, Any]:
        return next(job for job in self.before["jobs"] if job["id"] == job_id)

    def all_committed(self, job_id: str) -> bool:
        return all(s["committed_at"] for s in self.before["shards"] if s["job_id"] == job_id)

    def lease(self, holder: Holder, look: world.Contents) -> dict[str, Any]:
        key = (holder.attempt_id, holder.rank)
        return next(le for le in look["leases"] if (le["attempt_id"], le["rank"]) == key)

    def nothing_changed(self) -> bool:
        return self.look() == self.before

    def look(self) -> world.Contents:
        return world.contents(self.store)


def check_transitions(before: world.Contents, now: world.Contents) -> None:
    """One store call is at most one step of each job and attempt, and a legal one."""
    old_jobs = {job["id"]: job for job in before["jobs"]}
    for job in now["jobs"]:
        old = old_jobs.get(job["id"], job)
        was, state = JobState(old["state"]), JobState(job["state"])
        assert was is state or job_may_become(was, state), (was, state)
        assert job["token"] == old["token"] + (state is JobState.DISPATCHED and was is not state)
    old_attempts = {attempt["id"]: attempt for attempt in before["attempts"]}
    for attempt in now["attempts"]:
        before_it = AttemptState(old_attempts.get(attempt["id"], attempt)["state"])
        after_it = AttemptState(attempt["state"])
        assert before_it is after_it or attempt_may_become(before_it, after_it), attempt
    for shard in before["shards"]:
        if shard["committed_at"]:
            assert shard in now["shards"], "a committed shard was changed"


def check_rows(now: world.Contents) -> None:
    """The tables agree with one another."""
    for device in DEVICES:
        seats = [le["seat"] for le in open_leases(now) if le["device_id"] == device]
        assert len(seats) == len(set(seats)), "a seat is given twice"
        assert len(seats) < 2 or None not in seats, "a whole device is shared"
    for job in now["jobs"]:
        state = JobState(job["state"])
        mine = [a for a in now["attempts"] if a["job_id"] == job["id"]]
        active = [a for a in mine if not AttemptState(a["state"]).terminal]
        assert len(active) == int(state.active), (job["state"], active)
        assert [a["token"] for a in mine] == list(range(1, job["token"] + 1))
        if state is JobState.SUCCEEDED:
            assert mine[-1]["state"] == AttemptState.SUCCEEDED
            assert all(s["committed_at"] for s in now["shards"] if s["job_id"] == job["id"])
        told = [e["type"] for e in now["events"] if e["job_id"] == job["id"] and e["type"] in ENDS]
        assert told == ([job["state"]] if state.terminal else []), "the end is told once"
    kinds = {job["id"]: job["kind"] for job in now["jobs"]}
    for attempt in now["attempts"]:
        ranks = [le for le in now["leases"] if le["attempt_id"] == attempt["id"]]
        reserved = [le["rank"] for le in ranks if le["state"] == LeaseState.RESERVED]
        if not AttemptState(attempt["state"]).terminal:
            still_open = [le for le in ranks if le["state"] != LeaseState.RELEASED]
            assert still_open, "an active attempt that nothing would ever end"
        batch = kinds[attempt["job_id"]] == "infer" and attempt["state"] == AttemptState.RUNNING
        if attempt["state"] != AttemptState.DISPATCHED and not batch:
            assert not reserved
        if batch:
            held = [le["rank"] for le in ranks if le["state"] == LeaseState.HELD]
            assert held, "a batch job that nobody computes runs"
            assert len({le["rank"] for le in ranks}) == len(ranks) == attempt["world_size"]
        hints = [h["rank"] for h in now["outbox"] if h["attempt_id"] == attempt["id"]]
        assert hints == reserved, "a hint for each rank that nobody has claimed"


def open_leases(look: world.Contents) -> list[dict[str, Any]]:
    return [lease for lease in look["leases"] if lease["state"] != LeaseState.RELEASED]
