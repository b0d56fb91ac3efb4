"""Drives the real store functions in random order against a real Postgres.

After each call the invariants of the lifecycle must hold, a refused write must have changed nothing,
and at the end every job must still be able to come to an end.
"""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlmodel import Session, select

from shared.capability import device_queue
from shared.lifecycle import (
    FailureClass,
    JobState,
    LeaseState,
)
from shared.messages import FileDigest
from shared.store import Store
from shared.store.cancel import cancel_job
from shared.store.claim import Answer, Claimed, claim_rank, renew_lease
from shared.store.devices import drain_device, end_worker
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.finish import RowsLeft, fail_rank, finish_rank, leave_attempt, release_lease
from shared.store.growth import ask_back_rank, grow_attempt
from shared.store.ledger import lease_shards, record_deaths, split_shard
from shared.store.report import commit_checkpoint, record_progress
from shared.store.rescue import expired_leases, rescue_lease
from shared.tables import Device
from tests.store import world
from tests.store.lives import DEVICES, Lives, open_leases

pick = st.integers(0, 10**6)


class JobStore(Lives):
    @precondition(lambda self: len(self.jobs) < 8)
    @rule(devices=st.sampled_from([1, 1, 2]), shards=st.sampled_from([0, 2]))
    def submit(self, devices: int, shards: int) -> None:
        if shards:
            self.jobs.append(world.submit(self.store, shards=shards))
        else:
            self.jobs.append(world.submit(self.store, world.needs(devices=devices)))

    @precondition(lambda self: self.jobs)
    @rule(
        n=pick,
        order=st.permutations(DEVICES),
        targeted=st.booleans(),
        shared=st.booleans(),
        old_term=st.booleans(),
    )
    def dispatch(
        self, n: int, order: list[str], targeted: bool, shared: bool, old_term: bool
    ) -> None:
        queued = [j["id"] for j in self.before["jobs"] if j["state"] == JobState.QUEUED]
        some = queued if queued and n % 4 else self.jobs
        job_id = some[n // 4 % len(some)]
        job = self.job(job_id)
        count = int(job["resolved"]["requirements"]["devices"])
        term = self.terms[0] if old_term else self.terms[-1]
        queues = {d: device_queue(d) if targeted or shared else "cpu" for d in order}
        placed = [Placed(d, queues[d], shared) for d in order[:count]]
        attempt = self.store.call(
            dispatch_attempt, term, job_id, placed,
            label="x", claim_timeout=60, device_timeout=60, reason="test",
        )  # fmt: skip
        if attempt is None:
            assert self.nothing_changed()
            return
        assert term == self.terms[-1], "an old leader dispatched"
        assert attempt.token == job["token"] + 1
        self.hints += world.hints(self.store, attempt.id)

    @rule(devices=st.sampled_from([1, 2, 2]), shards=st.sampled_from([0, 0, 2]))
    def launch(self, devices: int, shards: int) -> None:
        """The usual way, in one go, so that the random ones start from running jobs, too."""
        busy = {lease["device_id"] for lease in open_leases(self.before)}
        up = [device for device in self.store.call(devices_up) if device not in busy]
        count = 1 if shards else devices
        if len(up) < count or len(self.jobs) >= 8:
            return
        job_id = world.submit(self.store, world.needs(devices=count), shards=shards)
        self.jobs.append(job_id)
        self.promises_are_kept()
        placed = ((device, "cpu") for device in up[:count])
        attempt = world.send(self.store, job_id, *placed, term=self.terms[-1])
        new = world.hints(self.store, attempt.id)
        self.hints += new
        for hint, device in zip(new, up, strict=False):
            self.promises_are_kept()
            claimed = world.claim(self.store, hint, device, self.workers[device])
            self.holders.append(claimed.holder)

    @precondition(lambda self: self.hints)
    @rule(n=pick, device=st.sampled_from(DEVICES), late=st.booleans())
    def claim(self, n: int, device: str, late: bool) -> None:
        hint = self.hints[n % len(self.hints)] if late else self.hints[-1 - n % 2 % len(self.hints)]
        claimed = self.store.call(claim_rank, hint, device, self.workers[device], 60)
        if isinstance(claimed, Claimed):
            self.holders.append(claimed.holder)
            lease = self.lease(claimed.holder, self.look())
            assert (lease["device_id"], lease["worker_id"]) == (device, self.workers[device])

    @precondition(lambda self: self.old_workers and self.hints)
    @rule(n=pick, m=pick)
    def claim_by_replaced_worker(self, n: int, m: int) -> None:
        device, worker = self.old_workers[m % len(self.old_workers)]
        found = self.store.call(claim_rank, self.hints[n % len(self.hints)], device, worker, 60)
        assert not isinstance(found, Claimed)
        assert self.nothing_changed()

    @precondition(lambda self: self.holders)
    @rule(n=pick)
    def renew(self, n: int) -> None:
        holder = self.holder(n)
        current = self.is_current(holder)
        answer = self.store.call(renew_lease, holder, 60).answer
        assert (answer is not Answer.STOP) == current
        cancelling = self.job(holder.job_id)["state"] == JobState.CANCELLING
        assert (answer is Answer.CANCEL) == (current and cancelling)
        staying = [lease for lease in self.others(holder) if not lease["asked_back"]]
        leaves = current and not cancelling and staying
        asked = self.lease(holder, self.before)["asked_back"]
        assert (answer is Answer.LEAVE) == bool(leaves and asked)

    @precondition(lambda self: self.jobs)
    @rule(n=pick, device=st.sampled_from(DEVICES), old_term=st.booleans())
    def grow(self, n: int, device: str, old_term: bool) -> None:
        running = self.running(n)
        if running is None:
            return
        term = self.terms[0] if old_term else self.terms[-1]
        rank = self.store.call(
            grow_attempt, term, running, Placed(device, device_queue(device)),
            label="x", most=None, claim_timeout=60, device_timeout=60, reason="test",
        )  # fmt: skip
        if rank is None:
            assert self.nothing_changed()
            return
        assert term == self.terms[-1], "an old leader gave a device"
        leases = [le for le in self.before["leases"] if le["attempt_id"] == running.attempt_id]
        assert rank == len(leases), "a number is given once"
        self.hints += world.hints(self.store, running.attempt_id)

    @precondition(lambda self: self.jobs)
    @rule(n=pick, rank=st.integers(0, 3))
    def ask_back(self, n: int, rank: int) -> None:
        running = self.running(n)
        if running is not None:
            asked = self.store.call(ask_back_rank, self.terms[-1], running, rank, "test")
            assert asked or self.nothing_changed()

    @precondition(lambda self: self.holders)
    @rule(n=pick, count=st.integers(1, 3), idle=st.booleans())
    def lease_rows(self, n: int, count: int, idle: bool) -> None:
        holder = self.holder(n)
        current = self.is_current(holder)
        found = self.store.call(lease_shards, holder, count, idle=idle)
        assert (found is not None) == current
        others = {lease["rank"] for lease in self.others(holder)}
        for each in found or ():
            shard = self.shard_of(holder.job_id, each.shard.index)
            assert not shard["committed_at"]
            assert shard["leased_token"] != holder.token or shard["leased_rank"] not in others
            assert idle or not each.deaths
            assert not each.deaths or len(found or ()) == 1

    @precondition(lambda self: self.holders)
    @rule(n=pick, m=pick)
    def engine_dies(self, n: int, m: int) -> None:
        holder = self.holder(n)
        leased = self.leased(holder)
        if not leased:
            return
        shard = leased[m % len(leased)]
        index, first, offset = (shard[name] for name in ("index", "first_row", "offset"))
        if shard["deaths"] and shard["rows"] > 1:
            cut = (index, first + 1, offset + 1, "test")
            self.write(n, lambda h: self.store.call(split_shard, h, *cut))
        else:
            self.write(n, lambda h: self.store.call(record_deaths, h, [index], "test"))

    @precondition(lambda self: self.holders)
    @rule(n=pick, step=st.integers(0, 3))
    def checkpoint(self, n: int, step: int) -> None:
        manifest = {"state": FileDigest(size=1, sha256="0" * 64)}
        self.write(n, lambda h: self.store.call(commit_checkpoint, h, step, "p", manifest))

    @precondition(lambda self: self.holders)
    @rule(n=pick, step=st.integers(0, 3))
    def progress(self, n: int, step: int) -> None:
        self.write(n, lambda h: self.store.call(record_progress, h, {"step": step}))

    @precondition(lambda self: self.holders)
    @rule(n=pick, m=pick)
    def shard(self, n: int, m: int) -> None:
        """Also one that is committed, or leased to another rank: it was, before that one was lost."""
        mine = [s for s in self.before["shards"] if s["job_id"] == self.holder(n).job_id]
        if mine:
            self.write(n, lambda h: self.commit(h, mine[m % len(mine)]))

    @precondition(lambda self: self.holders)
    @rule(n=pick)
    def finish(self, n: int) -> None:
        holder = self.holder(n)
        job = self.job(holder.job_id)
        rows_left = not self.all_committed(holder.job_id) and job["state"] == JobState.RUNNING
        if self.is_current(holder) and rows_left and not self.others(holder):
            with pytest.raises(RowsLeft):
                self.store.call(finish_rank, holder, {})
            assert self.nothing_changed()
        else:
            self.write(n, lambda h: self.store.call(finish_rank, h, {"rank": h.rank}))

    @precondition(lambda self: self.holders)
    @rule(n=pick, failure_class=st.sampled_from(FailureClass))
    def fail(self, n: int, failure_class: FailureClass) -> None:
        failure = world.failure(failure_class)
        self.write(n, lambda h: self.store.call(fail_rank, h, failure))

    @precondition(lambda self: self.holders)
    @rule(n=pick)
    def leave(self, n: int) -> None:
        holder = self.holder(n)
        cancelling = self.job(holder.job_id)["state"] == JobState.CANCELLING
        if self.is_current(holder) and not cancelling:
            with pytest.raises(AssertionError):
                self.store.call(leave_attempt, holder)
        else:
            self.write(n, lambda h: self.store.call(leave_attempt, h))

    @precondition(lambda self: self.holders)
    @rule(n=pick)
    def release(self, n: int) -> None:
        holder = self.holder(n)
        mine = self.lease(holder, self.before)
        held = (mine["state"], mine["worker_id"]) == (LeaseState.HELD, holder.worker_id)
        assert self.store.call(release_lease, holder) == held
        assert held or self.nothing_changed()

    @precondition(lambda self: self.jobs)
    @rule(n=pick)
    def cancel(self, n: int) -> None:
        active = [j["id"] for j in self.before["jobs"] if JobState(j["state"]).active]
        some = active if active and n % 4 else self.jobs
        before = self.job(some[n // 4 % len(some)])
        after = self.store.call(cancel_job, before["id"], "test")
        assert JobState(after.state).terminal or after.state == JobState.CANCELLING
        if JobState(before["state"]).terminal:
            assert self.nothing_changed()

    @rule(n=pick)
    def expire(self, n: int) -> None:
        """Time passes for one lease; its holder does not renew."""
        leases = open_leases(self.before)
        if leases:
            lease = leases[n % len(leases)]
            self.connection.execute(
                "UPDATE leases SET expires_at = expires_at - interval '1 hour'"
                " WHERE attempt_id = %s AND rank = %s",
                (lease["attempt_id"], lease["rank"]),
            )
            self.expired += self.store.call(expired_leases).leases

    @precondition(lambda self: self.expired)
    @rule(n=pick, old_term=st.booleans())
    def rescue(self, n: int, old_term: bool) -> None:
        """Also with what was read long ago: the lease may be renewed or gone since."""
        term = self.terms[0] if old_term else self.terms[-1]
        lost = self.expired[-1] if n % 2 else self.expired[n // 2 % len(self.expired)]
        out = {(e.attempt_id, e.rank) for e in self.store.call(expired_leases).leases}
        rescued = self.store.call(rescue_lease, term, lost)
        assert rescued == (term == self.terms[-1] and (lost.attempt_id, lost.rank) in out)
        assert rescued or self.nothing_changed()

    @rule(device=st.sampled_from(DEVICES))
    def restart_worker(self, device: str) -> None:
        self.old_workers.append((device, self.workers[device]))
        self.workers[device] = world.register(self.store, device)

    @rule(device=st.sampled_from(DEVICES), drain=st.booleans())
    def stop_worker(self, device: str, drain: bool) -> None:
        self.store.call(drain_device if drain else end_worker, self.workers[device])
        left = [le["state"] for le in open_leases(self.look()) if le["device_id"] == device]
        assert left in ([], [LeaseState.HELD] if drain else [])
        if not drain:  # a drained one stays so until it is restarted
            self.promises_are_kept()
            self.restart_worker(device)

    @rule()
    def change_leader(self) -> None:
        self.connection.execute("UPDATE leader SET expires_at = now() - interval '1 hour'")
        self.terms.append(world.become_leader(self.store, f"scheduler-{len(self.terms)}"))
        assert self.terms[-1] == self.terms[-2] + 1


def devices_up(session: Session) -> list[str]:
    query = select(Device.id).where(Device.state == "up").order_by(Device.id)
    return list(session.exec(query).all())


@pytest.mark.timeout(900)  # a failure takes long to be made small
def test_random_lives_keep_every_promise(store: Store) -> None:
    conninfo = store.url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        run_state_machine_as_test(
            lambda: JobStore(store, connection),
            settings=settings(
                max_examples=25,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
