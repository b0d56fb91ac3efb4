"""What the scheduler decides on besides the queue: batch jobs that run, which may grow and shrink."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import and_
from sqlalchemy import select as select_columns
from sqlmodel import Session, col, func, select

from shared.lifecycle import AttemptState, JobState, LeaseState
from shared.resolved import Requirements
from shared.store.growth import Running
from shared.tables import Attempt, Job, Lease, Shard


@dataclass(frozen=True, slots=True)
class BatchRank:
    rank: int
    device_id: str
    held: bool
    """Claimed, as against reserved."""
    asked_back: bool


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """A batch job that runs and that nobody cancels."""

    id: str
    attempt_id: str
    token: int
    priority: int
    requirements: Requirements
    model: str
    """The label that devices name what they hold warm by."""
    seconds_running: float
    """Of this attempt."""
    ranks: tuple[BatchRank, ...]
    """Those that are not gone, oldest first."""
    lost: tuple[str, ...] = ()
    """Devices of ranks of this attempt that did not end well, each as often as that was."""

    @property
    def running(self) -> Running:
        return Running(self.id, self.attempt_id, self.token)

    @property
    def label(self) -> str:
        """What Flower shows."""
        return f"infer:{self.model}"


@dataclass(frozen=True, slots=True)
class BatchWork:
    """What is left of a batch job."""

    unleased: int
    """Open shards that no rank computes."""
    rows_left: int
    """Rows that are not committed."""
    rows_done: int
    """Rows that this attempt committed."""


def running_batches(session: Session) -> tuple[RunningBatch, ...]:
    rows = session.execute(
        select_columns(
            col(Job.id),
            col(Job.priority),
            col(Job.resolved)["requirements"].label("requirements"),
            col(Job.resolved)["model"]["label"].astext.label("model"),
            col(Attempt.id).label("attempt_id"),
            col(Attempt.token),
            (func.clock_timestamp() - col(Attempt.started_at)).label("age"),
        )
        .join(
            Attempt, and_(col(Attempt.job_id) == col(Job.id), col(Attempt.token) == col(Job.token))
        )
        .where(
            col(Job.state) == JobState.RUNNING,
            col(Job.kind) == "infer",
            col(Attempt.state) == AttemptState.RUNNING,
        )
        .order_by(col(Job.id))
    ).all()
    if not rows:
        return ()
    ranks: dict[str, list[BatchRank]] = defaultdict(list)
    lost: dict[str, list[str]] = defaultdict(list)
    leases = (
        select(Lease)
        .where(col(Lease.attempt_id).in_([row.attempt_id for row in rows]))
        .order_by(col(Lease.rank))
    )
    for lease in session.exec(leases).all():
        if lease.state == LeaseState.RELEASED:
            if lease.claimed_at is not None and not lease.succeeded:
                lost[lease.attempt_id].append(lease.device_id)
            continue
        held = lease.state == LeaseState.HELD
        ranks[lease.attempt_id].append(
            BatchRank(lease.rank, lease.device_id, held, lease.asked_back)
        )
    return tuple(
        RunningBatch(
            id=row.id,
            attempt_id=row.attempt_id,
            token=row.token,
            priority=row.priority,
            requirements=Requirements.model_validate(row.requirements),
            model=row.model,
            seconds_running=row.age.total_seconds(),
            ranks=tuple(ranks[row.attempt_id]),
            lost=tuple(lost[row.attempt_id]),
        )
        for row in rows
    )


def batch_work(session: Session, job_ids: Collection[str]) -> dict[str, BatchWork]:
    """What is left of these jobs, by id. Reads all their shards: to be asked when it matters."""
    is_open = col(Shard.committed_at).is_(None)
    leased = (
        select(Lease.rank)
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .where(
            Attempt.job_id == Shard.job_id,
            Attempt.token == Job.token,
            Attempt.token == Shard.leased_token,
            Lease.rank == Shard.leased_rank,
            Lease.state == LeaseState.HELD,
        )
        .correlate(Shard, Job)
        .exists()
    )
    rows = session.execute(
        select_columns(
            col(Shard.job_id),
            func.count().filter(is_open, ~leased),
            func.coalesce(func.sum(Shard.rows).filter(is_open), 0),
            func.coalesce(func.sum(Shard.rows).filter(col(Shard.token) == col(Job.token)), 0),
        )
        .join(Job, col(Job.id) == col(Shard.job_id))
        .where(col(Shard.job_id).in_(job_ids))
        .group_by(col(Shard.job_id))
    ).all()
    return {
        job_id: BatchWork(unleased, int(left), int(done)) for job_id, unleased, left, done in rows
    }
