"""Taking back attempts whose lease ran out: nobody claimed them, or their worker is gone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, update
from sqlmodel import Session, col, func, select

from shared.lifecycle import AttemptState, FailureClass, LeaseState
from shared.store.engine import after, db_now
from shared.store.finish import Failure, lose_rank
from shared.store.guard import lock_job, tell
from shared.store.leader import leads
from shared.tables import Attempt, Device, Job, Lease, Outbox, Worker


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


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """What is known of a device that did not claim a rank reserved on it."""

    worker_id: str
    live: bool
    """Up, and heard of lately."""
    served_since_dispatch: bool
    """By the same worker process."""
    rings: int
    """How often the broker took the hint."""
    others_claimed: int
    """Ranks that other devices claimed since the dispatch."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """The device of a lease is to be passed over for so many ``seconds``."""

    worker_id: str
    reason: str
    seconds: float


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


def unclaimed(session: Session, lost: ExpiredLease, device_timeout: float) -> Unclaimed | None:
    """The evidence on the device of a lease that was never claimed. None: it is claimed or over by
    now, or its hint is gone."""
    found = session.exec(
        select(Lease, Device, Worker, Outbox)
        .join(Device, col(Device.id) == col(Lease.device_id))
        .join(Worker, col(Worker.id) == col(Device.worker_id))
        .join(
            Outbox,
            (col(Outbox.attempt_id) == Lease.attempt_id) & (col(Outbox.rank) == Lease.rank),
        )
        .where(_is(lost), Lease.state == LeaseState.RESERVED, Lease.device_id == lost.device_id)
    ).first()
    if found is None:
        return None
    lease, device, worker, hint = found
    others = select(func.count()).where(
        Lease.device_id != device.id, col(Lease.claimed_at) > lease.created_at
    )
    now = session.exec(select(func.clock_timestamp())).one()
    return Unclaimed(
        worker_id=worker.id,
        live=device.state == "up"
        and worker.ended_at is None
        and (now - worker.heartbeat_at).total_seconds() <= device_timeout,
        served_since_dispatch=worker.started_at <= lease.created_at,
        rings=hint.published,
        others_claimed=session.exec(others).one(),
    )


def _is(lost: ExpiredLease) -> ColumnElement[bool]:
    return (col(Lease.attempt_id) == lost.attempt_id) & (col(Lease.rank) == lost.rank)


def rescue_lease(
    session: Session, term: int, lost: ExpiredLease, suspect: Suspect | None = None
) -> bool:
    """Release an expired lease. If its attempt is out and cannot do without the rank (``lose_rank``), that
    ends as lost and the policy decides. Its device is passed over from now on if it is ``suspect``.

    False: it was renewed, released or claimed meanwhile, or this scheduler leads no more.
    """
    if not leads(session, term):
        return False
    job = lock_job(session, lost.job_id)
    if job is None:
        return False
    lease = session.exec(
        select(Lease)
        .where(
            _is(lost),
            Lease.state != LeaseState.RELEASED,
            col(Lease.expires_at) < db_now(),
        )
        .execution_options(populate_existing=True)
    ).first()
    if lease is None:
        return False
    was_held = lease.state == LeaseState.HELD
    if suspect is not None and not was_held and lease.device_id == lost.device_id:
        _pass_over(session, job, lost, suspect)
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
    attempt = session.get_one(Attempt, lost.attempt_id, populate_existing=True)
    lose_rank(session, job, attempt, lease, failure)
    return True


def _pass_over(session: Session, job: Job, lost: ExpiredLease, suspect: Suspect) -> None:
    """Until the device brings a hint (``claim_rank``), its worker restarts (``register_device``),
    or the time is over: then it may show with one rank whether it hears again."""
    marked = session.execute(
        update(Device)
        .where(col(Device.id) == lost.device_id, col(Device.worker_id) == suspect.worker_id)
        .values(suspect_until=after(suspect.seconds), suspect_reason=suspect.reason)
        .returning(col(Device.id))
    ).first()
    if marked is not None:
        number = session.exec(select(Attempt.number).where(Attempt.id == lost.attempt_id)).one()
        tell(
            session, job, "device_suspect",
            f"{lost.device_id} gets no work for now, it seems deaf: {suspect.reason}",
            attempt=number, device=lost.device_id, seconds=suspect.seconds,
        )  # fmt: skip
