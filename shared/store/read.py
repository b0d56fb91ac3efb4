"""What API and monitors read. Nothing here changes anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlmodel import Session, col, func, select

from shared.lifecycle import AttemptState, JobState, LeaseState
from shared.tables import (
    Artifact,
    Attempt,
    Checkpoint,
    Device,
    Event,
    File,
    Job,
    Lease,
    LogChunk,
    Metric,
    Shard,
    Worker,
)


def get_job(session: Session, job_id: str) -> Job | None:
    return session.get(Job, job_id)


def list_jobs(
    session: Session,
    *,
    states: Sequence[str] = (),
    kind: str | None = None,
    name: str | None = None,
    before: str | None = None,
    limit: int = 50,
) -> Sequence[Job]:
    """Newest first. ``before`` is the id of the last job of the page before (ids sort by time)."""
    query = select(Job).order_by(col(Job.id).desc()).limit(limit)
    if states:
        query = query.where(col(Job.state).in_(states))
    if kind is not None:
        query = query.where(Job.kind == kind)
    if name is not None:
        query = query.where(Job.name == name)
    if before is not None:
        query = query.where(col(Job.id) < before)
    return session.exec(query).all()


def list_attempts(session: Session, job_id: str) -> Sequence[Attempt]:
    return session.exec(
        select(Attempt).where(Attempt.job_id == job_id).order_by(col(Attempt.number))
    ).all()


def list_leases(session: Session, attempt_ids: Sequence[str]) -> Sequence[Lease]:
    return session.exec(
        select(Lease)
        .where(col(Lease.attempt_id).in_(attempt_ids))
        .order_by(col(Lease.attempt_id), col(Lease.rank))
    ).all()


def events_after(session: Session, job_id: str, after: int, limit: int = 500) -> Sequence[Event]:
    """In order. Ids of one job are committed in order (see ``guard``), so none is skipped."""
    return session.exec(
        select(Event)
        .where(Event.job_id == job_id, col(Event.id) > after)
        .order_by(col(Event.id))
        .limit(limit)
    ).all()


def logs_after(
    session: Session, job_id: str, after: int, *, rank: int | None = None, limit: int = 200
) -> Sequence[LogChunk]:
    query = select(LogChunk).where(LogChunk.job_id == job_id, col(LogChunk.id) > after)
    if rank is not None:
        query = query.where(LogChunk.rank == rank)
    return session.exec(query.order_by(col(LogChunk.id)).limit(limit)).all()


def list_metrics(session: Session, job_id: str, split: str | None = None) -> Sequence[Metric]:
    query = select(Metric).where(Metric.job_id == job_id)
    if split is not None:
        query = query.where(Metric.split == split)
    return session.exec(query.order_by(col(Metric.step), col(Metric.split))).all()


def list_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """Newest first."""
    return session.exec(
        select(Checkpoint)
        .where(Checkpoint.job_id == job_id)
        .order_by(col(Checkpoint.step).desc(), col(Checkpoint.token).desc())
    ).all()


def list_artifacts(session: Session, job_id: str) -> Sequence[Artifact]:
    """Those of the attempt that succeeded; nothing while there is none."""
    return session.exec(
        select(Artifact)
        .join(Attempt, col(Attempt.id) == col(Artifact.attempt_id))
        .where(Artifact.job_id == job_id, Attempt.state == AttemptState.SUCCEEDED)
        .order_by(col(Artifact.name))
    ).all()


def get_artifact(session: Session, job_id: str, name: str) -> Artifact | None:
    return session.exec(
        select(Artifact)
        .join(Attempt, col(Attempt.id) == col(Artifact.attempt_id))
        .where(
            Artifact.job_id == job_id,
            Artifact.name == name,
            Attempt.state == AttemptState.SUCCEEDED,
        )
    ).first()


def committed_shards(
    session: Session, job_id: str, after_row: int = -1, limit: int = 16
) -> Sequence[Shard]:
    """Shards with results that have rows beyond ``after_row``, in input order."""
    # The shard of the next row: found by the index, where the row's end would have to be computed of each.
    begins = (
        select(func.max(Shard.first_row))
        .where(Shard.job_id == job_id, col(Shard.first_row) <= after_row + 1)
        .scalar_subquery()
    )
    return session.exec(
        select(Shard)
        .where(
            Shard.job_id == job_id,
            col(Shard.first_row) >= begins,
            col(Shard.first_row) + col(Shard.rows) > after_row + 1,
            col(Shard.committed_at).is_not(None),
        )
        .order_by(col(Shard.first_row))
        .limit(limit)
    ).all()


def get_file(session: Session, file_id: str) -> File | None:
    return session.get(File, file_id)


def list_files(session: Session, *, before: str | None = None, limit: int = 50) -> Sequence[File]:
    query = select(File).order_by(col(File.id).desc()).limit(limit)
    if before is not None:
        query = query.where(col(File.id) < before)
    return session.exec(query).all()


@dataclass(frozen=True, slots=True)
class DeviceRow:
    device: Device
    worker: Worker
    seconds_silent: float
    runs: tuple[tuple[str, int], ...]
    """The jobs and ranks that it runs, or is reserved for; several where batch jobs share it."""


def list_devices(session: Session) -> list[DeviceRow]:
    now = session.exec(select(func.clock_timestamp())).one()
    runs: dict[str, list[tuple[str, int]]] = defaultdict(list)
    leases = (
        select(Lease.device_id, Attempt.job_id, Lease.rank)
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .where(Lease.state != LeaseState.RELEASED)
        .order_by(col(Lease.created_at), col(Lease.rank))
    )
    for device_id, job_id, rank in session.exec(leases).all():
        runs[device_id].append((job_id, rank))
    rows = session.exec(
        select(Device, Worker)
        .join(Worker, col(Worker.id) == col(Device.worker_id))
        .order_by(col(Device.id))
    ).all()
    return [
        DeviceRow(
            device, worker, (now - worker.heartbeat_at).total_seconds(), tuple(runs[device.id])
        )
        for device, worker in rows
    ]


def count_jobs(session: Session) -> dict[str, int]:
    """Jobs by state, every state named."""
    rows = session.exec(select(Job.state, func.count()).group_by(Job.state)).all()
    return {state.value: dict(rows).get(state.value, 0) for state in JobState}
