"""Steps 7 and 8: the end of a rank, of an attempt, and of a job.

``finish_rank``, ``fail_rank``, ``leave_attempt`` and ``release_lease`` are called by the worker once no
process of the rank is left; ``lose_rank`` by the scheduler's rescue and by registration.

The ranks of a training end together. Those of a batch job come and go: one that finished, or was lost,
ends the attempt only if no other rank computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session, col, select

from shared import retry
from shared.lifecycle import AttemptState, FailureClass, JobState, LeaseState
from shared.micro_batch import smaller_micro_batch
from shared.specs import Retry, TrainSpec
from shared.store.dispatch import drop_hints
from shared.store.engine import WAKE_ATTEMPT, WAKE_SCHEDULER, after, db_now, wake
from shared.store.footprints import BEYOND, record_out_of_memory, record_peak
from shared.store.guard import (
    Held,
    Holder,
    held,
    lock_job,
    move_attempt,
    move_job,
    release,
    storable,
    tell,
)
from shared.store.ledger import row_totals
from shared.store.models import publish_locked
from shared.store.usage import device_seconds
from shared.tables import Attempt, Device, Job, Lease


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended, for the policy and for people."""

    failure_class: FailureClass
    code: str
    message: str
    hint: str | None = None
    rows_at_once: int | None = None
    """What a training rank held when memory ran out; None: it was no matter of its batches."""

    def as_dict(self) -> dict[str, Any]:
        return dict(storable({"code": self.code, "message": self.message, "hint": self.hint}))


_OF_ONE_RANK = (
    FailureClass.PREEMPTED,
    FailureClass.LOST_WORKER,
    FailureClass.LOST_DEVICE,
    FailureClass.INFRASTRUCTURE,
)
"""Ends that say nothing about the job, as long as other ranks compute it."""


class RowsLeft(Exception):
    """Rows are open that nobody else computes: the rank has to go on. Nothing was changed."""


def finish_rank(session: Session, holder: Holder, summary: dict[str, Any]) -> bool:
    """This rank ended well. With the last one, attempt and job succeed. False: stale.

    Rank 0's summary becomes a training's; those of a batch job's ranks are put together.

    Raises:
        RowsLeft: of a batch job, whose last rank this is.
    """
    rows = held(session, holder)
    if rows is None:
        return False
    job, attempt, lease = rows.job, rows.attempt, rows.lease
    lease.succeeded = True
    release(lease)
    if job.kind == "infer":
        _finish_batch_rank(session, rows, summary)
        wake(session, WAKE_SCHEDULER)
        return True
    peak = summary.get("peak_memory_bytes")
    as_submitted = attempt.micro_batch is None  # what is known is about that
    if as_submitted and job.footprint_key is not None and isinstance(peak, int) and peak > 0:
        record_peak(session, job.footprint_key, peak)
    if holder.rank == 0:
        job.summary = storable(summary)
    session.flush()
    others = session.exec(select(Lease).where(Lease.attempt_id == attempt.id)).all()
    if job.state == JobState.CANCELLING and not all(other.succeeded for other in others):
        # A cancelled gang in which some ranks left and this one had finished before it heard.
        _cancel_with_last_rank(session, job, attempt)
    elif all(other.succeeded for other in others):
        _succeed(session, job, attempt)
    wake(session, WAKE_SCHEDULER)
    return True


def _finish_batch_rank(session: Session, rows: Held, summary: dict[str, Any]) -> None:
    job, attempt = rows.job, rows.attempt
    session.flush()
    totals = row_totals(session, job.id)
    known = job.summary or {}
    spent = {
        name: round(known.get(name, 0) + summary[name], 3)
        for name in ("compute_seconds", "load_seconds")
        if name in summary
    }
    job.summary = storable({**known, **summary, **spent, **totals})
    if _held_ranks(session, attempt.id):
        if job.state == JobState.RUNNING:
            rank, device = rows.lease.rank, rows.lease.device_id
            tell(
                session, job, "rank_left", f"rank {rank} leaves {device}; others go on",
                attempt=attempt.number, rank=rank, device=device,
            )  # fmt: skip
    elif totals["done"] == totals["rows"]:
        _succeed(session, job, attempt)
    elif job.state == JobState.CANCELLING:
        _cancel_with_last_rank(session, job, attempt)
    else:
        raise RowsLeft(f"{job.id} has {totals['done']} of {totals['rows']} rows")


def _succeed(session: Session, job: Job, attempt: Attempt) -> None:
    move_attempt(attempt, AttemptState.SUCCEEDED)
    attempt.finished_at = db_now()  # type: ignore[assignment]
    _release_reserved(session, attempt)
    session.flush()
    move_job(job, JobState.SUCCEEDED)
    job.summary = {**(job.summary or {}), "device_seconds": device_seconds(session, job.id)}
    job.finished_at = db_now()  # type: ignore[assignment]
    if job.kind == "infer" and job.progress is not None and job.summary is not None:
        rows = job.summary["rows"]
        job.progress = {**job.progress, "step": rows, "total_steps": rows}
    tell(session, job, "succeeded", "succeeded", attempt=attempt.number, summary=job.summary)
    if name := job.spec.get("publish"):
        publish_locked(session, job, name, created_by=job.created_by or "")


def fail_rank(session: Session, holder: Holder, failure: Failure) -> bool:
    """This rank failed, and with it the attempt. False: stale (another rank was first, say).

    A batch job loses only the rank, as long as others go on and nothing is wrong with the job itself.
    """
    rows = held(session, holder)
    if rows is None:
        return False
    release(rows.lease)
    session.flush()
    if failure.failure_class in _OF_ONE_RANK and _goes_on(session, rows.job, rows.attempt):
        _tell_lost(session, rows.job, rows.attempt, rows.lease, failure)
        return True
    if failure.failure_class is FailureClass.OUT_OF_MEMORY:
        # Before the job is queued: it goes on where it was, with less at once.
        _remember_out_of_memory(session, rows)
    _end(session, rows.job, rows.attempt, AttemptState.FAILED, failure)
    return True


def _remember_out_of_memory(session: Session, rows: Held) -> None:
    """The next training of this configuration is to have a larger device, if there is one. On a fleet
    of equal devices it would wait for ever, and half of the rows may well fit."""
    key, device = rows.job.footprint_key, session.get(Device, rows.lease.device_id)
    if key is None or device is None or rows.attempt.micro_batch is not None:
        return
    larger = session.exec(
        select(Device.id)
        .where(
            Device.accelerator == device.accelerator,
            Device.state != "gone",
            col(Device.memory_bytes) > int(device.memory_bytes * BEYOND),
        )
        .limit(1)
    ).first()
    if larger is not None:
        record_out_of_memory(session, key, device.memory_bytes)


def leave_attempt(session: Session, holder: Holder) -> bool:
    """This rank ended because its job was cancelled. With the last one, the job is cancelled."""
    rows = held(session, holder)
    if rows is None:
        return False
    job, attempt = rows.job, rows.attempt
    if job.state != JobState.CANCELLING:
        raise AssertionError(f"{job.id} is {job.state}: its ranks may not leave")
    release(rows.lease)
    session.flush()
    _cancel_with_last_rank(session, job, attempt)
    wake(session, WAKE_SCHEDULER)
    return True


def _cancel_with_last_rank(session: Session, job: Job, attempt: Attempt) -> None:
    if not _held_ranks(session, attempt.id):
        reason = job.cancel_reason or "by the user"
        cancelled = Failure(FailureClass.CANCELLED, "cancelled", reason)
        _end(session, job, attempt, AttemptState.CANCELLED, cancelled)


def release_lease(session: Session, holder: Holder) -> bool:
    """The processes of a rank are gone, and it reports no end of its own: its device is free. False:
    it was released before.

    Meant for stale ranks. Should the attempt still be out (the worker gave up renewing, and nobody
    has rescued it), the rank is lost with this: without a lease nothing else would ever end it.
    """
    job = lock_job(session, holder.job_id)
    attempt = session.get(Attempt, holder.attempt_id, populate_existing=True)
    lease = session.get(Lease, (holder.attempt_id, holder.rank), populate_existing=True)
    if job is None or attempt is None or lease is None or attempt.token != holder.token:
        return False
    if lease.state != LeaseState.HELD or lease.worker_id != holder.worker_id:
        return False
    abandoned = Failure(
        FailureClass.LOST_WORKER,
        "abandoned",
        f"{lease.device_id} gave up rank {lease.rank}: it could not keep its lease",
        "See whether its host reaches Postgres.",
    )
    lose_rank(session, job, attempt, lease, abandoned)
    return True


def lose_rank(session: Session, job: Job, attempt: Attempt, lease: Lease, failure: Failure) -> None:
    """Release the lease of a rank that nobody runs (any more), whether its attempt is over or out. The
    caller holds the job's lock and knows that the lease is not released.

    An attempt that is out is lost with it. A batch job goes on as long as other ranks compute, and what
    this one had leased is open again; with its last rank lost it succeeds all the same if all rows are
    committed.
    """
    release(lease)
    session.flush()
    wake(session, WAKE_SCHEDULER)
    if job.token != attempt.token or AttemptState(attempt.state).terminal:
        return
    if _goes_on(session, job, attempt):
        _tell_lost(session, job, attempt, lease, failure)
    elif job.kind == "infer" and job.state == JobState.RUNNING and _complete(session, job):
        _succeed(session, job, attempt)
    else:
        _end(session, job, attempt, AttemptState.LOST, failure)


def _goes_on(session: Session, job: Job, attempt: Attempt) -> bool:
    """Whether the attempt can do without the rank whose lease was just released."""
    return job.kind == "infer" and bool(_held_ranks(session, attempt.id))


def _complete(session: Session, job: Job) -> bool:
    totals = row_totals(session, job.id)
    if totals["done"] < totals["rows"]:
        return False
    job.summary = storable({**(job.summary or {}), **totals})
    return True


def _tell_lost(
    session: Session, job: Job, attempt: Attempt, lease: Lease, failure: Failure
) -> None:
    """A rank less; the others find open what it had leased."""
    claimed = lease.claimed_at is not None
    drop_hints(session, attempt.id, lease.rank)
    wake(session, WAKE_SCHEDULER)
    tell(
        session, job, "rank_lost" if claimed else "rank_unclaimed",
        f"rank {lease.rank}: {failure.message}; others go on",
        attempt=attempt.number, rank=lease.rank, device=lease.device_id, code=failure.code,
    )  # fmt: skip


def _held_ranks(session: Session, attempt_id: str) -> Sequence[int]:
    return session.exec(
        select(Lease.rank).where(Lease.attempt_id == attempt_id, Lease.state == LeaseState.HELD)
    ).all()


def _end(
    session: Session, job: Job, attempt: Attempt, state: AttemptState, failure: Failure
) -> None:
    """End an attempt that is out, and decide what follows. Reserved leases are released here; held ones
    stay until their workers, who are woken, have ended the ranks, or until they run out."""
    move_attempt(attempt, state)
    attempt.finished_at = db_now()  # type: ignore[assignment]
    attempt.failure_class = failure.failure_class
    attempt.failure = failure.as_dict()
    _release_reserved(session, attempt)
    wake(session, WAKE_ATTEMPT, attempt.id)
    wake(session, WAKE_SCHEDULER)
    tell(
        session, job, f"attempt_{state}", f"attempt {attempt.number}: {failure.message}",
        attempt=attempt.number, failure_class=failure.failure_class, **failure.as_dict(),
    )  # fmt: skip
    if job.state == JobState.CANCELLING:
        _cancelled(session, job, attempt)
    else:
        _retry_or_fail(session, job, attempt, failure)


def _release_reserved(session: Session, attempt: Attempt) -> None:
    reserved = select(Lease).where(
        Lease.attempt_id == attempt.id, Lease.state == LeaseState.RESERVED
    )
    for lease in session.exec(reserved).all():
        release(lease)
    drop_hints(session, attempt.id)
    session.flush()


def _cancelled(session: Session, job: Job, attempt: Attempt) -> None:
    move_job(job, JobState.CANCELLED)
    job.failure_class = FailureClass.CANCELLED
    job.finished_at = db_now()  # type: ignore[assignment]
    reason = job.cancel_reason or "by the user"
    tell(session, job, "cancelled", f"cancelled: {reason}", attempt=attempt.number)


def _retry_or_fail(session: Session, job: Job, attempt: Attempt, failure: Failure) -> None:
    ended = session.exec(
        select(Attempt.failure_class, Attempt.micro_batch, Attempt.progressed)
        .where(Attempt.job_id == job.id, col(Attempt.failure_class).is_not(None))
        .order_by(col(Attempt.number))
    ).all()
    ends = [
        retry.End(FailureClass(why), micro_batch, progressed)
        for why, micro_batch, progressed in ended
        if why
    ]
    less = _less_at_once(job, attempt, failure)
    decision = retry.decide(Retry(**job.spec["retry"]), ends, less)
    if isinstance(decision, retry.TryAgain):
        move_job(job, JobState.QUEUED)
        if decision.micro_batch is not None:
            job.micro_batch = decision.micro_batch
        job.not_before = after(decision.after_seconds)  # type: ignore[assignment]
        job.waiting_reason = f"tried again after {failure.code}"
        tell(
            session, job, "retry", f"{decision.reason}; again {_when(decision.after_seconds)}",
            attempt=attempt.number, after_seconds=decision.after_seconds,
            **({"micro_batch": decision.micro_batch} if decision.micro_batch else {}),
        )  # fmt: skip
        return
    move_job(job, JobState.FAILED)
    job.failure_class = failure.failure_class
    job.failure = failure.as_dict()
    job.finished_at = db_now()  # type: ignore[assignment]
    tell(
        session, job, "failed", failure.message,
        attempt=attempt.number, reason=decision.reason, **{"class": failure.failure_class},
    )  # fmt: skip


def _when(seconds: float) -> str:
    return f"in {seconds:.3g} s" if seconds else "at once"


def _less_at_once(job: Job, attempt: Attempt, failure: Failure) -> retry.LessAtOnce | None:
    """What a training that ran out of memory can hold less of."""
    held = failure.rows_at_once
    if failure.failure_class is not FailureClass.OUT_OF_MEMORY or held is None:
        return None
    spec = TrainSpec.model_validate(job.spec)
    smaller = smaller_micro_batch(spec, attempt.micro_batch, held)
    return None if smaller is None else retry.LessAtOnce(held, smaller)
