"""Fencing: which writes of a worker count.

Every write of a worker names its ``Holder``. It counts only while the attempt's token is the newest
of the job, the attempt is not over and the worker holds the rank's lease. Everything else is
*stale*: an answer, not an error. Locking the job row first also gives every job's events, logs and
transitions one order, so a reader that saw id n has seen all before it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session, col, select

from shared.lifecycle import AttemptState, JobState, LeaseState, attempt_may_become, job_may_become
from shared.store.engine import WAKE_JOB, db_now, wake
from shared.tables import Attempt, Event, Job, Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who writes: one rank of one attempt, in one life of a worker."""

    job_id: str
    attempt_id: str
    token: int
    rank: int
    worker_id: str


@dataclass(frozen=True, slots=True)
class Held:
    """The rows that a holder's write is about, locked."""

    job: Job
    attempt: Attempt
    lease: Lease


def lock_job(session: Session, job_id: str) -> Job | None:
    """The job row, locked to the end of the transaction. Always the first lock taken."""
    return session.exec(
        select(Job)
        .where(Job.id == job_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).first()


def held(session: Session, holder: Holder) -> Held | None:
    """The locked rows if the holder's writes count; None if it is stale."""
    job = lock_job(session, holder.job_id)
    attempt, lease = attempt_and_lease(session, holder.attempt_id, holder.rank)
    if (
        job is None
        or attempt is None
        or lease is None
        or job.token != holder.token
        or attempt.token != holder.token
        or AttemptState(attempt.state).terminal
        or lease.state != LeaseState.HELD
        or lease.worker_id != holder.worker_id
    ):
        log.warning("stale write refused: %s", holder)
        return None
    return Held(job, attempt, lease)


def attempt_and_lease(
    session: Session, attempt_id: str, rank: int
) -> tuple[Attempt | None, Lease | None]:
    """Both as they are now. Read after the job is locked, never in the statement that locks it: what
    that waited for would be missing from them."""
    found = session.exec(
        select(Attempt, Lease)
        .join(Lease, col(Lease.attempt_id) == col(Attempt.id))
        .where(Attempt.id == attempt_id, Lease.rank == rank)
        .execution_options(populate_existing=True)
    ).first()
    return (None, None) if found is None else (found[0], found[1])


def move_job(job: Job, target: JobState) -> None:
    """The one place a job's state is written.

    Raises:
        AssertionError: the transition is not in the lifecycle; a defect, nothing is committed.
    """
    source = JobState(job.state)
    if not job_may_become(source, target):
        raise AssertionError(f"illegal job transition {source} -> {target} of {job.id}")
    job.state = target


def move_attempt(attempt: Attempt, target: AttemptState) -> None:
    """The one place an attempt's state is written.

    Raises:
        AssertionError: the transition is not in the lifecycle; a defect, nothing is committed.
    """
    source = AttemptState(attempt.state)
    if not attempt_may_become(source, target):
        raise AssertionError(f"illegal attempt transition {source} -> {target} of {attempt.id}")
    attempt.state = target


def tell(
    session: Session,
    job: Job,
    type: str,
    message: str,
    /,
    *,
    attempt: int | None = None,
    **data: Any,
) -> None:
    """Add to the job's story. The caller holds the job's lock."""
    clean: dict[str, Any] = storable(data)
    session.add(
        Event(job_id=job.id, attempt=attempt, type=type, message=storable(message), data=clean)
    )
    wake(session, WAKE_JOB, job.id)


def storable(value: Any) -> Any:
    """``value`` as Postgres can keep it: text and JSONB have no NUL, and JSON has no NaN (a loss that
    diverged becomes null). What went wrong in a job must never make its report fail, too."""
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    return value


def release(lease: Lease) -> None:
    lease.state = LeaseState.RELEASED
    lease.released_at = db_now()  # type: ignore[assignment]
