"""What is known about the memory of configurations, and how jobs come to use it.

A submission asks (``ask``); a worker measures what nobody has measured (``claim_measurement``,
``record_measurement``, ``fail_measurement``); trainings that succeed leave their peak (``record_peak``),
those that ran out of memory the size of their device (``record_out_of_memory``). Jobs that wait get each
better figure at once, with a line in their story.

Locks: a footprint before *queued* jobs, and a *running* job before its footprint. No transaction waits for
a queued job while another that holds it waits for a footprint, so the two orders do not meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import and_, or_
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, select

from shared.capability import GIB
from shared.footprint import Configuration
from shared.lifecycle import JobState
from shared.resolved import Requirements
from shared.store.engine import WAKE_MEASURE, WAKE_SCHEDULER, after, db_now, wake
from shared.store.guard import storable, tell
from shared.tables import Footprint, Job

BEYOND = 1.05
"""How much more than the memory of a device that it outgrew a training is taken to need, at least."""
TRIES = 3
"""Claims of a measurement that never came to an end, after which nobody claims it any more."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The best that is known."""

    bytes: int
    source: Literal["estimate", "measured", "remembered"]


def best_figure(footprint: Footprint) -> Figure:
    """A real peak counts more than a measurement, and that more than arithmetic; and nothing is ever less
    than what a training outgrew. Pure."""
    if footprint.peak_bytes is not None:
        best = Figure(footprint.peak_bytes, "remembered")
    elif footprint.measured_bytes is not None:
        best = Figure(footprint.measured_bytes, "measured")
    else:
        best = Figure(footprint.estimated_bytes, "estimate")
    floor = int((footprint.exceeded_bytes or 0) * BEYOND)
    return Figure(floor, "remembered") if floor > best.bytes else best


def with_figure(needs: Requirements, figure: Figure) -> Requirements:
    """What the user asked for stays. Pure."""
    if not needs.memory_is_estimate:
        return needs
    return needs.model_copy(update={"memory_bytes": figure.bytes, "memory_from": figure.source})


def known_needs(session: Session, key: str, needs: Requirements) -> Requirements:
    """``needs`` by the best figure there is for this configuration."""
    footprint = session.get(Footprint, key)
    return needs if footprint is None else with_figure(needs, best_figure(footprint))


def ask(
    session: Session, configuration: Configuration, estimated_bytes: int, needs: Requirements
) -> Requirements:
    """``needs`` by the best figure there is; a configuration that nobody asked for before is to be
    measured. What is found out later than this transaction also reaches the job that it inserts."""
    inserted = session.execute(
        pg_insert(Footprint)
        .values(
            key=configuration.key,
            configuration=storable(configuration.model_dump(mode="json")),
            estimated_bytes=estimated_bytes,
        )
        .on_conflict_do_nothing(index_elements=["key"])
        .returning(col(Footprint.key))
    ).first()
    if inserted is not None:
        wake(session, WAKE_MEASURE)
    # Shared: who brings a better figure waits until the job is there to be found.
    footprint = session.exec(
        select(Footprint)
        .where(Footprint.key == configuration.key)
        .with_for_update(read=True)
        .execution_options(populate_existing=True)
    ).one()
    return with_figure(needs, best_figure(footprint))


def claim_measurement(session: Session, worker: str, expires_after: float) -> Footprint | None:
    """The oldest configuration that is to be measured, now this worker's; also one whose worker has not
    come back for so many seconds. None: there is nothing to do."""
    while True:
        open_ = or_(
            col(Footprint.state) == "wanted",
            and_(
                col(Footprint.state) == "measuring",
                col(Footprint.claimed_at) < after(-expires_after),
            ),
        )
        footprint = session.exec(
            select(Footprint)
            .where(open_)
            .order_by(col(Footprint.created_at))
            .limit(1)
            .with_for_update(skip_locked=True)
        ).first()
        if footprint is None:
            return None
        if footprint.tries >= TRIES:
            _end(footprint, "failed")
            footprint.error = f"it was begun {TRIES} times, and never came to an end"
            session.flush()
            continue
        footprint.state = "measuring"
        footprint.claimed_by = worker
        footprint.claimed_at = db_now()  # type: ignore[assignment]
        footprint.tries += 1
        session.flush()
        return footprint


def record_measurement(session: Session, key: str, worker: str, measured_bytes: int) -> bool:
    """The worker has measured. False: stale, somebody else is at it or was faster."""
    footprint = _claimed(session, key, worker)
    if footprint is None:
        return False
    _end(footprint, "measured")
    footprint.measured_bytes = measured_bytes
    _tell_waiting(session, footprint)
    return True


def fail_measurement(session: Session, key: str, worker: str, error: str) -> bool:
    """It cannot be measured, and why: the arithmetic stays. False: stale."""
    footprint = _claimed(session, key, worker)
    if footprint is None:
        return False
    _end(footprint, "failed")
    footprint.error = storable(error)
    return True


def record_peak(session: Session, key: str, peak_bytes: int) -> bool:
    """A rank of a training of this configuration took so much, whole process or device, and succeeded.
    The largest counts. False: there is no such configuration."""
    footprint = _locked(session, key)
    if footprint is None:
        return False
    footprint.peak_bytes = max(peak_bytes, footprint.peak_bytes or 0)
    _tell_waiting(session, footprint)
    return True


def record_out_of_memory(session: Session, key: str, device_bytes: int) -> bool:
    """A rank of a training of this configuration ran out of the memory of a device of this size: the next
    one needs ``BEYOND`` times as much, at least, whatever is measured or remembered. False: there is no
    such configuration.

    A training that went on with a smaller micro-batch says nothing about this configuration that would
    undo it: its peak may be recorded all the same.
    """
    footprint = _locked(session, key)
    if footprint is None:
        return False
    footprint.exceeded_bytes = max(device_bytes, footprint.exceeded_bytes or 0)
    _tell_waiting(session, footprint)
    return True


def _locked(session: Session, key: str) -> Footprint | None:
    return session.exec(
        select(Footprint)
        .where(Footprint.key == key)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).first()


def _claimed(session: Session, key: str, worker: str) -> Footprint | None:
    footprint = _locked(session, key)
    if footprint is None or footprint.state != "measuring" or footprint.claimed_by != worker:
        return None
    return footprint


def _end(footprint: Footprint, state: str) -> None:
    footprint.state = state
    footprint.claimed_by = footprint.claimed_at = None


def _tell_waiting(session: Session, footprint: Footprint) -> None:
    """Give queued jobs of the configuration the figure that is the best now."""
    session.flush()
    figure = best_figure(footprint)
    jobs = session.exec(
        select(Job)
        .where(Job.footprint_key == footprint.key, Job.state == JobState.QUEUED)
        .order_by(col(Job.id))
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    for job in jobs:
        before = Requirements.model_validate(job.resolved["requirements"])
        needs = with_figure(before, figure)
        if needs == before:
            continue
        job.resolved = {**job.resolved, "requirements": needs.model_dump(mode="json")}
        tell(
            session, job, "footprint",
            f"needs {figure.bytes / GIB:.2f} GiB a device, {figure.source}"
            f" (before: {before.memory_bytes / GIB:.2f} GiB, {before.memory_from})",
            memory_bytes=figure.bytes, memory_from=figure.source,
        )  # fmt: skip
    if jobs:
        wake(session, WAKE_SCHEDULER)
