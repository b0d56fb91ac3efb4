"""Step 2: what the scheduler decides on, read in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import BigInteger, cast
from sqlalchemy import select as select_columns
from sqlmodel import Session, col, func, select

from shared.capability import Capability
from shared.lifecycle import JobState, LeaseState
from shared.resolved import Requirements
from shared.store.batches import RunningBatch, running_batches
from shared.tables import Attempt, Device, Job, Lease, Worker


@dataclass(frozen=True, slots=True)
class WaitingJob:
    id: str
    priority: int
    created_at: datetime
    requirements: Requirements
    label: str
    """What Flower shows: kind and model."""
    not_before: datetime | None = None
    model: str = ""
    """The label that devices name what they hold warm by."""
    shares: bool = False
    """A batch job: it may compute beside others on one device."""
    ranks_ending: bool = False
    """Ranks of its last attempt still hold devices."""
    waiting_reason: str | None = None
    """What the job says now of why it waits."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A rank of a batch job that has a seat of a device."""

    job_id: str
    priority: int
    model: str
    memory_bytes: int
    """What the job needs of a device."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    id: str
    host: str
    capability: Capability
    simulated: bool
    live: bool
    """Up, its worker was heard of lately, and it does not seem deaf: it may get work."""
    known: bool
    """Belongs to the fleet: not gone in an orderly way. A silent device may come back."""
    busy: bool
    """Reserved or held, the whole or a seat of it."""
    warm: tuple[str, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    """The batch jobs that have seats of it; none where the whole is taken."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: datetime
    jobs: tuple[WaitingJob, ...]
    """Queued ones, in no particular order."""
    devices: tuple[DeviceState, ...]
    batches: tuple[RunningBatch, ...] = ()
    """Batch jobs that run."""


def take_snapshot(session: Session, device_timeout: float, limit: int = 10_000) -> Snapshot:
    """All devices, batch jobs that run, and the ``limit`` first queued jobs by priority and age."""
    now = session.exec(select(func.clock_timestamp())).one()
    ending = (
        select(Attempt.job_id)
        .join(Lease, col(Lease.attempt_id) == col(Attempt.id))
        .where(Attempt.job_id == Job.id, Lease.state != LeaseState.RELEASED)
        .exists()
    )
    # Columns, not whole jobs: a spec may carry thousands of inline rows.
    jobs = session.execute(
        select_columns(
            col(Job.id),
            col(Job.priority),
            col(Job.created_at),
            col(Job.kind),
            col(Job.not_before),
            col(Job.waiting_reason),
            col(Job.resolved)["requirements"].label("requirements"),
            col(Job.resolved)["model"]["label"].astext.label("model"),
            ending.label("ranks_ending"),
        )
        .where(col(Job.state) == JobState.QUEUED)
        .order_by(col(Job.priority).desc(), col(Job.created_at), col(Job.id))
        .limit(limit)
    ).all()
    return Snapshot(
        now=now,
        jobs=tuple(
            WaitingJob(
                id=job.id,
                priority=job.priority,
                created_at=job.created_at,
                requirements=Requirements.model_validate(job.requirements),
                label=f"{job.kind}:{job.model}",
                model=job.model,
                shares=job.kind == "infer",
                not_before=job.not_before,
                ranks_ending=bool(job.ranks_ending),
                waiting_reason=job.waiting_reason,
            )
            for job in jobs
        ),
        devices=read_devices(session, now, device_timeout),
        batches=running_batches(session),
    )


def read_devices(session: Session, now: datetime, device_timeout: float) -> tuple[DeviceState, ...]:
    """The fleet as it is."""
    tenants = _tenants(session)
    rows = session.exec(
        select(Device, Worker)
        .join(Worker, col(Worker.id) == col(Device.worker_id))
        .order_by(col(Device.id))
    ).all()
    return tuple(
        DeviceState(
            id=device.id,
            host=device.host,
            capability=Capability(
                "cuda" if device.accelerator == "cuda" else "cpu",
                device.compute_capability,
                device.memory_bytes,
            ),
            simulated=device.simulated,
            live=device.state == "up"
            and worker.ended_at is None
            and (now - worker.heartbeat_at).total_seconds() <= device_timeout
            and (device.suspect_until is None or device.suspect_until <= now),
            known=device.state != "gone",
            busy=device.id in tenants,
            warm=tuple(device.warm),
            tenants=tenants.get(device.id, ()),
        )
        for device, worker in rows
    )


def _tenants(session: Session) -> dict[str, tuple[Tenant, ...]]:
    """By device that is taken; none of one that is taken as a whole."""
    rows = session.execute(
        select_columns(
            col(Lease.device_id),
            col(Lease.seat),
            col(Job.id),
            col(Job.priority),
            col(Job.resolved)["model"]["label"].astext,
            cast(col(Job.resolved)["requirements"]["memory_bytes"].astext, BigInteger),
        )
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .join(Job, col(Job.id) == col(Attempt.job_id))
        .where(col(Lease.state) != LeaseState.RELEASED)
        .order_by(col(Lease.device_id), col(Lease.seat))
    ).all()
    found: dict[str, tuple[Tenant, ...]] = {}
    for device_id, seat, job_id, priority, model, memory in rows:
        found.setdefault(device_id, ())
        if seat is not None:
            found[device_id] += (Tenant(job_id, priority, model, memory or 0),)
    return found
