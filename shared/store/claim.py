"""Step 4: a worker takes a rank. Compare-and-set in Postgres; the hint alone means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Integer, case, literal, update
from sqlmodel import Session, col, func, select

from shared.capability import device_queue
from shared.lifecycle import AttemptState, JobState, LeaseState
from shared.messages import EndedAttempt, Hint
from shared.store.dispatch import drop_hints
from shared.store.engine import WAKE_ATTEMPT, WAKE_SCHEDULER, after, db_now, wake
from shared.store.growth import others_compute
from shared.store.guard import (
    Holder,
    attempt_and_lease,
    held,
    lock_job,
    move_attempt,
    move_job,
    tell,
)
from shared.tables import Attempt, Checkpoint, Device, Job, Lease, Outbox, Worker


class Refusal(StrEnum):
    """Why a hint leads to nothing. None of them is an error."""

    STALE = "stale"
    """The attempt is over, or another one is newer."""
    CLAIMED = "claimed"
    """Somebody has the rank already."""
    CANCELLED = "cancelled"
    NOT_SERVING = "not_serving"
    """This worker process is not the one its device is registered to, or it drains."""
    DEVICE_BUSY = "device_busy"
    """The device is reserved for a rank that only it can run; the hint is due again at once."""


@dataclass(frozen=True, slots=True)
class CommittedCheckpoint:
    id: str
    step: int
    path: str
    """Relative to the data folder."""
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claimed:
    """Everything a worker needs to run its rank."""

    holder: Holder
    kind: str
    attempt_number: int
    world_size: int
    micro_batch: int | None
    """Of this attempt, where memory had run out with a larger one before."""
    spec: dict[str, Any]
    resolved: dict[str, Any]
    checkpoints: tuple[CommittedCheckpoint, ...]
    """Newest first, by step and then by attempt."""
    best: tuple[CommittedCheckpoint, ...]
    """The best models that those build on, in the same order."""
    ended: tuple[EndedAttempt, ...] = ()
    """The attempts before this one, oldest first."""
    seconds_running: float = 0.0
    """How long the attempt runs already: above 0 for a rank that a batch job was given later."""


def claim_rank(
    session: Session, hint: Hint, device_id: str, worker_id: str, lease_ttl: float
) -> Claimed | Refusal:
    """reserved -> held. With the last rank of the attempt: dispatched -> running, job and attempt. A
    running batch job may be given further ranks, which just begin.

    A hint of a class queue may reach another device of the class than the one reserved: the
    reservation then moves to the claiming device, or changes places with the claiming device's own.
    """
    job = lock_job(session, hint.job_id)
    _trust(session, device_id, worker_id)
    attempt, lease = attempt_and_lease(session, hint.attempt_id, hint.rank)
    if job is None or attempt is None or lease is None or job.token != hint.token:
        return Refusal.STALE
    if job.state in (JobState.CANCELLING, JobState.CANCELLED):
        return Refusal.CANCELLED
    if AttemptState(attempt.state).terminal or lease.state == LeaseState.RELEASED:
        return Refusal.STALE
    if lease.state == LeaseState.HELD:
        return Refusal.CLAIMED
    # Shared with nobody who registers or drains it: either sees this claim, or this sees that.
    device = session.get(Device, device_id, populate_existing=True, with_for_update={"read": True})
    if device is None or device.worker_id != worker_id or device.state != "up":
        return Refusal.NOT_SERVING
    if lease.device_id != device_id and not _move_reservation(session, lease, device_id):
        session.execute(
            update(Outbox)
            .where(col(Outbox.attempt_id) == hint.attempt_id, col(Outbox.rank) == hint.rank)
            .values(due_at=after(1.0))
        )
        return Refusal.DEVICE_BUSY
    session.refresh(lease)
    lease.state = LeaseState.HELD
    lease.worker_id = worker_id
    lease.claimed_at = db_now()  # type: ignore[assignment]
    lease.expires_at = after(lease_ttl)  # type: ignore[assignment]
    drop_hints(session, attempt.id, hint.rank)
    session.flush()
    tell(
        session, job, "claimed", f"{device_id} took rank {hint.rank}",
        attempt=attempt.number, rank=hint.rank, device=device_id,
    )  # fmt: skip
    if attempt.state == AttemptState.DISPATCHED and not _reserved(session, attempt.id):
        _start(session, job, attempt)
        running = 0.0
    else:
        running = _seconds_since(session, attempt.started_at)
    checkpoints, best = _checkpoints(session, job.id)
    return Claimed(
        holder=Holder(job.id, attempt.id, attempt.token, hint.rank, worker_id),
        kind=job.kind,
        attempt_number=attempt.number,
        world_size=attempt.world_size,
        micro_batch=attempt.micro_batch,
        spec=job.spec,
        resolved=job.resolved,
        checkpoints=checkpoints,
        best=best,
        ended=_ended(session, job.id, attempt.number),
        seconds_running=running,
    )


def _trust(session: Session, device_id: str, worker_id: str) -> None:
    """A device that seemed deaf and brings a hint, an old one perhaps, is not."""
    heard = session.execute(
        update(Device)
        .where(
            col(Device.id) == device_id,
            col(Device.worker_id) == worker_id,
            col(Device.suspect_until).is_not(None),
        )
        .values(suspect_until=None, suspect_reason=None)
        .returning(col(Device.id))
    ).first()
    if heard is not None:
        wake(session, WAKE_SCHEDULER)


def _start(session: Session, job: Job, attempt: Attempt) -> None:
    move_attempt(attempt, AttemptState.RUNNING)
    attempt.started_at = db_now()  # type: ignore[assignment]
    move_job(job, JobState.RUNNING)
    if job.started_at is None:
        job.started_at = db_now()  # type: ignore[assignment]
    tell(session, job, "running", f"attempt {attempt.number} runs", attempt=attempt.number)
    wake(session, WAKE_ATTEMPT, attempt.id)


def _move_reservation(session: Session, lease: Lease, device_id: str) -> bool:
    """Move the reservation to ``device_id``, or swap it with one there. False: it cannot be."""
    open_ones = _lock_open_leases(session, lease, device_id)
    if lease.device_id == device_id:
        return True  # the owner of the other reservation has just swapped the two
    there = [found for found in open_ones if found.device_id == device_id]
    here = [found for found in open_ones if found.device_id == lease.device_id]
    if not there:
        session.execute(
            update(Lease)
            .where(_is(lease))
            .values(device_id=device_id, seat=None if lease.seat is None else 0)
        )
        return True
    other = next((found for found in there if _may_move(session, found)), None)
    if other is None or ((lease.seat is None) != (other.seat is None) and len(there + here) > 2):
        return False  # a whole device is taken with nobody else there
    # One statement: the exclusion constraint is checked when it ends, not between its rows.
    both_seats = lease.seat is not None and other.seat is not None
    seats = (other.seat, lease.seat) if both_seats else (lease.seat, other.seat)
    session.execute(
        update(Lease)
        .where(_is(lease) | _is(other))
        .values(
            device_id=case((_is(lease), device_id), else_=lease.device_id),
            seat=case((_is(lease), literal(seats[0], Integer)), else_=literal(seats[1], Integer)),
        )
        .execution_options(synchronize_session=False)
    )
    return True


def _may_move(session: Session, lease: Lease) -> bool:
    """Whether it is reserved only, and any device of its class may take it."""
    if lease.state != LeaseState.RESERVED:
        return False
    hint = session.get(Outbox, (lease.attempt_id, lease.rank))
    return hint is not None and hint.queue != device_queue(lease.device_id)


def _is(lease: Lease) -> ColumnElement[bool]:
    return (col(Lease.attempt_id) == lease.attempt_id) & (col(Lease.rank) == lease.rank)


def _lock_open_leases(session: Session, lease: Lease, device_id: str) -> Sequence[Lease]:
    """Lock the open leases of both devices, in one order: two workers that hold each other's hint
    arrive here together, and would wait for each other."""
    while True:
        found = session.exec(
            select(Lease)
            .where(
                col(Lease.device_id).in_([lease.device_id, device_id]),
                Lease.state != LeaseState.RELEASED,
            )
            .order_by(col(Lease.device_id), col(Lease.attempt_id))
            .with_for_update()
            .execution_options(populate_existing=True)
        ).all()
        if lease in found:
            return found
        session.refresh(lease)  # a third claim moved it while we waited


def _reserved(session: Session, attempt_id: str) -> bool:
    left = select(Lease.rank).where(
        Lease.attempt_id == attempt_id, Lease.state == LeaseState.RESERVED
    )
    return session.exec(left.limit(1)).first() is not None


def _seconds_since(session: Session, started_at: datetime | None) -> float:
    if started_at is None:
        return 0.0
    now: datetime = session.exec(select(func.clock_timestamp())).one()
    return max(0.0, (now - started_at).total_seconds())


def _checkpoints(
    session: Session, job_id: str
) -> tuple[tuple[CommittedCheckpoint, ...], tuple[CommittedCheckpoint, ...]]:
    """The newest to go on from, and the best ones that they build on."""
    of_job = (
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id)
        .order_by(col(Checkpoint.step).desc(), col(Checkpoint.token).desc())
    )
    newest = session.exec(of_job.limit(10)).all()
    build_on = [row.best_step for row in newest if row.best_step is not None]
    is_best = col(Checkpoint.best_step) == col(Checkpoint.step)
    best = session.exec(of_job.where(is_best, col(Checkpoint.step).in_(build_on))).all()
    return tuple(map(_committed, newest)), tuple(map(_committed, best))


def _ended(session: Session, job_id: str, before: int) -> tuple[EndedAttempt, ...]:
    query = (
        select(Attempt)
        .where(Attempt.job_id == job_id, Attempt.number < before)
        .order_by(col(Attempt.number))
    )
    return tuple(
        EndedAttempt(
            number=row.number,
            ranks=row.world_size,
            failure_class=row.failure_class or row.state,
            code=str((row.failure or {}).get("code", "")),
            message=str((row.failure or {}).get("message", "")),
            started_at=row.started_at,
            finished_at=row.finished_at,
        )
        for row in session.exec(query).all()
    )


def _committed(row: Checkpoint) -> CommittedCheckpoint:
    return CommittedCheckpoint(row.id, row.step, row.path, row.manifest)


class Answer(StrEnum):
    """What a renewal is answered with."""

    GO_ON = "go_on"
    LEAVE = "leave"
    """Of a batch job: the device is wanted back, and other ranks go on. Finish what is computed now, lease
    no more, then ``finish_rank``."""
    CANCEL = "cancel"
    """The user cancelled the job: end the ranks, then ``leave_attempt``."""
    STOP = "stop"
    """Stale: the attempt is over or another holds the lease. End the ranks; nothing they wrote
    counts; then ``release_lease``."""


@dataclass(frozen=True, slots=True)
class Renewal:
    answer: Answer
    rendezvous: str | None = None
    """Where rank 0 listens, once it does and every rank is claimed."""


def renew_lease(session: Session, holder: Holder, lease_ttl: float) -> Renewal:
    """Extend the right to run. A lease that ran out and that nobody rescued is extended as well:
    while Postgres was away nobody could rescue, and the run was healthy."""
    rows = held(session, holder)
    if rows is None:
        return Renewal(Answer.STOP)
    rows.lease.expires_at = after(lease_ttl)  # type: ignore[assignment]
    session.execute(
        update(Worker).where(col(Worker.id) == holder.worker_id).values(heartbeat_at=db_now())
    )
    if rows.job.state == JobState.CANCELLING:
        return Renewal(Answer.CANCEL)
    if rows.lease.asked_back and others_compute(session, holder.attempt_id, holder.rank):
        return Renewal(Answer.LEAVE)
    running = rows.attempt.state == AttemptState.RUNNING
    return Renewal(Answer.GO_ON, rows.attempt.rendezvous if running else None)


def publish_rendezvous(session: Session, holder: Holder, address: str) -> bool:
    """Rank 0 listens at ``address`` (host:port); the other ranks hear of it when they renew."""
    rows = held(session, holder)
    if rows is None:
        return False
    rows.attempt.rendezvous = address
    wake(session, WAKE_ATTEMPT, holder.attempt_id)
    return True
