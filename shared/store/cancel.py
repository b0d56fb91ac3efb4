"""Ends of a job that no worker reports: a user's cancel, and what can never run."""

from __future__ import annotations

from sqlmodel import Session, select

from shared.errors import NotFound
from shared.lifecycle import AttemptState, FailureClass, JobState, LeaseState
from shared.store.dispatch import drop_hints
from shared.store.engine import WAKE_ATTEMPT, WAKE_SCHEDULER, db_now, wake
from shared.store.guard import lock_job, move_attempt, move_job, release, tell
from shared.tables import Attempt, Job, Lease


def cancel_job(session: Session, job_id: str, reason: str) -> Job:
    """Ask for the end of a job; repeating it, or cancelling a finished job, changes nothing.

    queued, or dispatched with no rank claimed -> cancelled at once; otherwise -> cancelling: the
    workers hear of it with their next renewal, which this wakes.

    Raises:
        NotFound: no such job.
    """
    job = lock_job(session, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}", param="job_id")
    state = JobState(job.state)
    if state.terminal or state is JobState.CANCELLING:
        return job
    job.cancel_requested_at = db_now()  # type: ignore[assignment]
    job.cancel_reason = reason
    attempt = session.exec(
        select(Attempt).where(
            Attempt.job_id == job_id,
            Attempt.state.in_([AttemptState.DISPATCHED, AttemptState.RUNNING]),  # type: ignore[attr-defined]
        )
    ).first()
    if attempt is None:
        _close(session, job, None, reason)
        return job
    leases = session.exec(select(Lease).where(Lease.attempt_id == attempt.id)).all()
    for lease in leases:
        if lease.state == LeaseState.RESERVED:
            release(lease)
    drop_hints(session, attempt.id)
    if any(lease.state == LeaseState.HELD for lease in leases):
        move_job(job, JobState.CANCELLING)
        tell(session, job, "cancelling", f"cancel asked for: {reason}", attempt=attempt.number)
        wake(session, WAKE_ATTEMPT, attempt.id)
    else:
        move_attempt(attempt, AttemptState.CANCELLED)
        attempt.finished_at = db_now()  # type: ignore[assignment]
        _close(session, job, attempt.number, reason)
    session.flush()
    session.refresh(job)
    return job


def _close(session: Session, job: Job, attempt: int | None, reason: str) -> None:
    move_job(job, JobState.CANCELLED)
    job.failure_class = FailureClass.CANCELLED
    job.waiting_reason = None
    job.finished_at = db_now()  # type: ignore[assignment]
    tell(session, job, "cancelled", f"cancelled: {reason}", attempt=attempt)
    wake(session, WAKE_SCHEDULER)


def fail_queued_job(
    session: Session, job_id: str, code: str, message: str, hint: str | None
) -> bool:
    """End a queued job that can never run. False: it is not queued any more."""
    job = lock_job(session, job_id)
    if job is None or job.state != JobState.QUEUED:
        return False
    move_job(job, JobState.FAILED)
    job.failure_class = FailureClass.USER_ERROR
    job.failure = {"code": code, "message": message, "hint": hint}
    job.waiting_reason = None
    job.finished_at = db_now()  # type: ignore[assignment]
    tell(session, job, "failed", message, code=code, hint=hint)
    return True


def cancel_attempt(session: Session, attempt_id: str, reason: str) -> bool:
    """Cancel the job of an attempt that is out: what a revoked Celery task asks for. False, and
    nothing changed: the attempt is over, or there is none; the job may be in another by now."""
    attempt = session.get(Attempt, attempt_id)
    if attempt is None or AttemptState(attempt.state).terminal:
        return False
    job = lock_job(session, attempt.job_id)
    session.refresh(attempt)  # it may have ended before the job was locked
    if job is None or job.token != attempt.token or AttemptState(attempt.state).terminal:
        return False
    cancel_job(session, attempt.job_id, reason)
    return True
