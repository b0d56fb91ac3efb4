"""Taking back attempts whose lease ran out: nobody claimed them, or their worker is gone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session, col, func, select

from shared.lifecycle import AttemptState, FailureClass, LeaseState
from shared.store.engine import WAKE_SCHEDULER, db_now, wake
from shared.store.finish import Failure, end_attempt
from shared.store.guard import lock_job, release
from shared.store.leader import leads
from shared.tables import Attempt, Lease


@dataclass(frozen=True, slots=True)
class ExpiredLease:
    job_id: str
    attempt_id: str
    token: int
    rank: int
    device_id: str
    held: bool
    """Claimed and not renewed, as against never claimed."""
    attempt_over: bool
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Expired:
    leases: tuple[ExpiredLease, ...]
    now: datetime
    postgres_up_since: datetime
    """Leases that ran out while Postgres was away are not rescued before their holders had time."""


def expired_leases(session: Session, limit: int = 200) -> Expired:
    """Every open lease that ran out, by the database's clock."""
    now, since = session.exec(select(func.clock_timestamp(), func.pg_postmaster_start_time())).one()
    rows = session.exec(
        select(Lease, Attempt)
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .where(Lease.state != LeaseState.RELEASED, col(Lease.expires_at) < db_now())
        .order_by(col(Lease.expires_at))
        .limit(limit)
    ).all()
    leases = tuple(
        ExpiredLease(
            job_id=attempt.job_id,
            attempt_id=attempt.id,
            token=attempt.token,
            rank=lease.rank,
            device_id=lease.device_id,
            held=lease.state == LeaseState.HELD,
            attempt_over=AttemptState(attempt.state).terminal,
            expires_at=lease.expires_at,
        )
        for lease, attempt in rows
    )
    return Expired(leases, now, since)


def rescue_lease(session: Session, term: int, lost: ExpiredLease) -> bool:
    """Release an expired lease; if its attempt is out, that ends as lost and the policy decides.

    False: it was renewed, released or claimed meanwhile, or this scheduler leads no more.
    """
    if not leads(session, term) or lock_job(session, lost.job_id) is None:
        return False
    lease = session.exec(
        select(Lease)
        .where(
            Lease.attempt_id == lost.attempt_id,
            Lease.rank == lost.rank,
            Lease.state != LeaseState.RELEASED,
            col(Lease.expires_at) < db_now(),
        )
        .execution_options(populate_existing=True)
    ).first()
    if lease is None:
        return False
    was_held = lease.state == LeaseState.HELD
    release(lease)
    session.flush()
    if was_held:
        failure = Failure(
            FailureClass.LOST_WORKER,
            "lease_expired",
            f"the worker of {lease.device_id} was not heard of any more",
            "See whether its host is up and reaches Postgres.",
        )
    else:
        failure = Failure(
            FailureClass.UNCLAIMED,
            "not_claimed",
            f"{lease.device_id} did not take rank {lease.rank} in time",
            "See whether the broker and the worker are up.",
        )
    end_attempt(session, lost.job_id, lost.attempt_id, lost.token, AttemptState.LOST, failure)
    wake(session, WAKE_SCHEDULER)
    return True
