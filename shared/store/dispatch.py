"""Step 3: an attempt, its token, its device reservations and its hints, committed together.

The broker hears of it only afterwards, from the outbox; a hint that is lost there is due again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ARRAY, Text, cast, delete, update
from sqlmodel import Session, col, func, select

from shared import ids
from shared.capability import SEATS
from shared.lifecycle import JobState, LeaseState
from shared.messages import Hint
from shared.store.engine import after, db_now
from shared.store.guard import lock_job, move_job, tell
from shared.store.leader import leads
from shared.tables import Attempt, Device, Job, Lease, Outbox, Worker


@dataclass(frozen=True, slots=True)
class Placed:
    """A device chosen for a rank and the queue that its hint goes to."""

    device_id: str
    queue: str
    shared: bool = False
    """Of a batch job: others may compute there, which it joins."""


def dispatch_attempt(
    session: Session,
    term: int,
    job_id: str,
    placed: Sequence[Placed],
    *,
    label: str,
    claim_timeout: float,
    device_timeout: float,
    reason: str,
) -> Attempt | None:
    """queued -> dispatched. All ranks get a device or none does.

    None, and nothing changed: this scheduler leads no more, the job is not queued any more, ranks
    of its last attempt still hold devices, or a device was lost or taken since the snapshot.
    """
    if not leads(session, term):
        return None
    job = lock_job(session, job_id)
    if job is None or job.state != JobState.QUEUED or _open_leases(session, job_id):
        return None
    chosen = [p.device_id for p in placed]
    seats = take_places(session, placed, device_timeout, shares=job.kind == "infer")
    if seats is None:
        return None
    number = session.exec(select(func.count()).where(Attempt.job_id == job_id)).one() + 1
    job.token += 1
    attempt = Attempt(
        id=ids.new_id(ids.ATTEMPT),
        job_id=job_id,
        number=number,
        token=job.token,
        world_size=len(placed),
        micro_batch=job.micro_batch,
    )
    session.add(attempt)
    session.flush()
    for rank, (place, seat) in enumerate(zip(placed, seats, strict=True)):
        hint = Hint(job_id=job_id, attempt_id=attempt.id, token=job.token, rank=rank)
        session.add(
            Lease(
                attempt_id=attempt.id,
                rank=rank,
                device_id=place.device_id,
                seat=seat,
                expires_at=after(claim_timeout),  # type: ignore[arg-type]
            )
        )
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
    move_job(job, JobState.DISPATCHED)
    job.waiting_reason = None
    job.not_before = None
    tell(
        session,
        job,
        "dispatched",
        f"attempt {number} goes to {', '.join(chosen)}: {reason}",
        attempt=number,
        devices=chosen,
        queues=[p.queue for p in placed],
    )
    return attempt


def take_places(
    session: Session, placed: Sequence[Placed], device_timeout: float, *, shares: bool
) -> list[int | None] | None:
    """Lock the devices of these places, each of another one; the seats that are free there, for a job that
    ``shares`` devices, else None for each, which is the whole.

    None, if one of them is not up, not heard of lately, or not free: what is taken leaves a seat to one
    that was to join others, and nothing to any other.
    """
    chosen = [place.device_id for place in placed]
    live = session.exec(
        select(Device.id)
        .join(Worker, col(Worker.id) == col(Device.worker_id))
        .where(
            col(Device.id).in_(chosen),
            Device.state == "up",
            col(Worker.ended_at).is_(None),
            col(Worker.heartbeat_at) > after(-device_timeout),
        )
        .with_for_update(of=Device)
    ).all()
    if set(live) != set(chosen) or len(set(chosen)) != len(chosen):
        return None
    # After the lock, in a statement of its own: what that waited for is seen.
    taken: dict[str, set[int | None]] = {device_id: set() for device_id in chosen}
    open_ones = select(Lease.device_id, Lease.seat).where(
        col(Lease.device_id).in_(chosen), Lease.state != LeaseState.RELEASED
    )
    for device_id, seat in session.exec(open_ones).all():
        taken[device_id].add(seat)
    seats: list[int | None] = []
    for place in placed:
        there = taken[place.device_id]
        left = [seat for seat in range(SEATS) if seat not in there]
        if there and (not shares or not place.shared or None in there or not left):
            return None
        seats.append(left[0] if shares else None)
    return seats


def _open_leases(session: Session, job_id: str) -> bool:
    found = session.exec(
        select(Lease.rank)
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .where(Attempt.job_id == job_id, Lease.state != LeaseState.RELEASED)
        .limit(1)
    ).first()
    return found is not None


def due_hints(session: Session, limit: int = 100) -> Sequence[Outbox]:
    """Hints to publish now: new ones, and those nobody claimed for a while."""
    return session.exec(
        select(Outbox)
        .where(col(Outbox.due_at) <= db_now())
        .order_by(col(Outbox.due_at))
        .limit(limit)
    ).all()


def mark_published(session: Session, attempt_id: str, rank: int, again_after: float) -> None:
    """The broker took the hint; unless it is claimed by then, it is due again."""
    session.execute(
        update(Outbox)
        .where(col(Outbox.attempt_id) == attempt_id, col(Outbox.rank) == rank)
        .values(published=Outbox.published + 1, due_at=after(again_after))
    )


def drop_hints(session: Session, attempt_id: str, rank: int | None = None) -> None:
    """The attempt is over, or the rank claimed: nobody needs the hint any more."""
    where = [col(Outbox.attempt_id) == attempt_id]
    if rank is not None:
        where.append(col(Outbox.rank) == rank)
    session.execute(delete(Outbox).where(*where))


def set_waiting_reasons(session: Session, reasons: dict[str, str]) -> None:
    """Tell each queued job why it does not run. Touches only rows whose reason changed.

    One statement for all of them: when a job leaves, those behind it may all get another reason.
    """
    if not reasons:
        return
    ids_and_reasons = (cast(list(part), ARRAY(Text)) for part in (reasons, reasons.values()))
    new = func.unnest(*ids_and_reasons).table_valued("id", "reason").render_derived(name="new")
    session.execute(
        update(Job)
        .where(
            col(Job.id) == new.c.id,
            col(Job.state) == JobState.QUEUED,
            col(Job.waiting_reason).is_distinct_from(new.c.reason),
        )
        .values(waiting_reason=new.c.reason)
        .execution_options(synchronize_session=False)
    )
