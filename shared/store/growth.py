"""A batch job gets further ranks while it runs, and gives ranks back when others need the devices."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import update
from sqlmodel import Session, col, func, select

from shared.lifecycle import AttemptState, JobState, LeaseState
from shared.messages import Hint
from shared.store.dispatch import Placed, drop_hints, take_places
from shared.store.engine import WAKE_ATTEMPT, WAKE_SCHEDULER, after, wake
from shared.store.guard import lock_job, release, tell
from shared.store.leader import leads
from shared.tables import Attempt, Job, Lease, Outbox


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt at a batch job as the scheduler saw it."""

    job_id: str
    attempt_id: str
    token: int


def grow_attempt(
    session: Session,
    term: int,
    running: Running,
    place: Placed,
    *,
    label: str,
    most: int | None,
    claim_timeout: float,
    device_timeout: float,
    reason: str,
) -> int | None:
    """One rank more, on a device of its own; its number, which no rank of the attempt had before.

    None, and nothing changed: this scheduler leads no more, the attempt does not run any more, it has
    the ``most`` ranks that its spec allows, or the device was lost or taken since the snapshot.
    """
    found = _lock_running(session, term, running)
    if found is None:
        return None
    job, attempt = found
    leases = session.exec(select(Lease).where(Lease.attempt_id == attempt.id)).all()
    out = [lease for lease in leases if lease.state != LeaseState.RELEASED]
    if most is not None and len(out) >= most:
        return None
    seats = take_places(session, [place], device_timeout, shares=True)
    if seats is None:
        return None
    rank = max(lease.rank for lease in leases) + 1
    attempt.world_size = rank + 1
    session.add(
        Lease(
            attempt_id=attempt.id,
            rank=rank,
            device_id=place.device_id,
            seat=seats[0],
            expires_at=after(claim_timeout),  # type: ignore[arg-type]
        )
    )
    hint = Hint(job_id=job.id, attempt_id=attempt.id, token=job.token, rank=rank)
    session.add(
        Outbox(
            attempt_id=attempt.id,
            rank=rank,
            queue=place.queue,
            label=label,
            hint=hint.model_dump(),
            priority=job.priority,
        )
    )
    tell(
        session, job, "grown", f"rank {rank} is given {place.device_id}: {reason}",
        attempt=attempt.number, rank=rank, device=place.device_id, queue=place.queue,
    )  # fmt: skip
    return rank


def ask_back_rank(session: Session, term: int, running: Running, rank: int, reason: str) -> bool:
    """Want the device of a rank back. One that is claimed leaves with what it computes now, if others go
    on; one that is not is taken back at once. False: it was asked or is gone, or others are not there.
    """
    found = _lock_running(session, term, running)
    if found is None:
        return False
    job, attempt = found
    lease = session.get(Lease, (attempt.id, rank), populate_existing=True)
    if lease is None or lease.asked_back or lease.state == LeaseState.RELEASED:
        return False
    if not others_compute(session, attempt.id, rank):
        return False
    lease.asked_back = True
    if lease.state == LeaseState.RESERVED:
        release(lease)
        drop_hints(session, attempt.id, rank)
        wake(session, WAKE_SCHEDULER)
    else:
        wake(session, WAKE_ATTEMPT, attempt.id)
    tell(
        session, job, "asked_back", f"{lease.device_id} is wanted back from rank {rank}: {reason}",
        attempt=attempt.number, rank=rank, device=lease.device_id,
    )  # fmt: skip
    return True


def ask_back_ranks(session: Session, device_id: str) -> None:
    """The device is being drained: a rank of a batch job on it is to leave, if others go on."""
    asked = session.execute(
        update(Lease)
        .where(
            col(Lease.device_id) == device_id,
            col(Lease.state) == LeaseState.HELD,
            col(Lease.asked_back).is_(False),
            select(Attempt.id)
            .join(Job, col(Job.id) == col(Attempt.job_id))
            .where(Attempt.id == Lease.attempt_id, Job.kind == "infer")
            .exists(),
        )
        .values(asked_back=True)
        .returning(col(Lease.attempt_id))
        .execution_options(synchronize_session=False)
    ).all()
    for (attempt_id,) in asked:
        wake(session, WAKE_ATTEMPT, attempt_id)


def others_compute(session: Session, attempt_id: str, rank: int) -> bool:
    """Whether other ranks of the attempt are held that nobody wants back."""
    others = select(func.count()).where(
        Lease.attempt_id == attempt_id,
        Lease.rank != rank,
        Lease.state == LeaseState.HELD,
        col(Lease.asked_back).is_(False),
    )
    return session.exec(others).one() > 0


def _lock_running(session: Session, term: int, running: Running) -> tuple[Job, Attempt] | None:
    if not leads(session, term):
        return None
    job = lock_job(session, running.job_id)
    attempt = session.get(Attempt, running.attempt_id, populate_existing=True)
    if job is None or attempt is None or job.kind != "infer" or job.state != JobState.RUNNING:
        return None
    if job.token != running.token or attempt.state != AttemptState.RUNNING:
        return None
    return job, attempt
