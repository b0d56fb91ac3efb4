"""Devices and the worker processes that serve them: registration, heartbeat, drain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, select

from shared import ids
from shared.capability import Capability
from shared.lifecycle import FailureClass, LeaseState
from shared.store.engine import WAKE_SCHEDULER, db_now, wake
from shared.store.finish import Failure, lose_rank
from shared.store.growth import ask_back_ranks
from shared.store.guard import lock_job
from shared.tables import Attempt, Device, Lease, Worker


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the inventory found out about one device."""

    id: str
    host: str
    model: str
    capability: Capability
    uuid: str | None = None
    simulated: bool = False


def register_device(session: Session, facts: DeviceFacts, pid: int, version: str) -> str:
    """A worker process starts to serve a device: its worker id.

    Whatever the process before it held is lost, and its processes are gone (the caller has swept
    them): those attempts end now and not only when their leases run out.
    """
    worker = Worker(
        id=ids.new_id(ids.WORKER), device_id=facts.id, host=facts.host, pid=pid, version=version
    )
    session.execute(
        update(Worker)
        .where(col(Worker.device_id) == facts.id, col(Worker.ended_at).is_(None))
        .values(ended_at=db_now())
    )
    session.add(worker)
    session.flush()
    new: dict[str, Any] = {
        "host": facts.host,
        "worker_id": worker.id,
        "state": "up",
        "accelerator": facts.capability.accelerator,
        "model": facts.model,
        "uuid": facts.uuid,
        "compute_capability": facts.capability.compute_capability,
        "memory_bytes": facts.capability.memory_bytes,
        "queue": facts.capability.queue,
        "simulated": facts.simulated,
        "warm": [],
        "suspect_until": None,
        "suspect_reason": None,
        "registered_at": db_now(),
    }
    session.execute(
        pg_insert(Device)
        .values(id=facts.id, **new)
        .on_conflict_do_update(index_elements=["id"], set_=new)
    )
    _end_left_overs(session, facts.id, LeaseState.HELD, f"the worker of {facts.id} was restarted")
    wake(session, WAKE_SCHEDULER)
    return worker.id


def _end_left_overs(session: Session, device_id: str, state: LeaseState, message: str) -> None:
    """Take back the leases of this state on the device, and with them the attempts that cannot do
    without (``lose_rank``). A rank that nobody claimed yet costs the job no try."""
    failure = (
        Failure(FailureClass.LOST_WORKER, "worker_restarted", message)
        if state is LeaseState.HELD
        else Failure(FailureClass.UNCLAIMED, "device_leaves", message)
    )
    left = session.exec(
        select(Lease, Attempt)
        .join(Attempt, col(Attempt.id) == col(Lease.attempt_id))
        .where(Lease.device_id == device_id, Lease.state == state)
    ).all()
    for lease, attempt in left:
        job = lock_job(session, attempt.job_id)
        session.refresh(lease)
        if job is None or lease.state != state or lease.device_id != device_id:
            continue
        session.refresh(attempt)
        lose_rank(session, job, attempt, lease, failure)


def heartbeat(session: Session, worker_id: str, warm: list[str] | None = None) -> bool:
    """The worker process is alive. False: another one has taken its device over; it should end."""
    beaten = session.execute(
        update(Worker)
        .where(col(Worker.id) == worker_id, col(Worker.ended_at).is_(None))
        .values(heartbeat_at=db_now())
        .returning(col(Worker.id))
    ).first()
    if beaten is not None and warm is not None:
        session.execute(
            update(Device)
            .where(col(Device.worker_id) == worker_id, col(Device.warm) != warm)
            .values(warm=warm)
        )
    return beaten is not None


def drain_device(session: Session, worker_id: str) -> bool:
    """Give the device no new work, and what it has not begun to another; what it runs goes on, but for
    a rank of a batch job, which leaves if others go on."""
    device = _set_state(session, worker_id, "draining")
    if device is not None:
        _end_left_overs(session, device, LeaseState.RESERVED, f"{device} is being drained")
        ask_back_ranks(session, device)
        wake(session, WAKE_SCHEDULER)
    return device is not None


def end_worker(session: Session, worker_id: str) -> bool:
    """The worker process ends in an orderly way; its device is gone until another serves it."""
    device = _set_state(session, worker_id, "gone")
    if device is not None:
        for state in (LeaseState.RESERVED, LeaseState.HELD):
            _end_left_overs(session, device, state, f"the worker of {device} was stopped")
    ended = session.execute(
        update(Worker)
        .where(col(Worker.id) == worker_id, col(Worker.ended_at).is_(None))
        .values(ended_at=db_now())
        .returning(col(Worker.id))
    ).first()
    wake(session, WAKE_SCHEDULER)
    return ended is not None


def _set_state(session: Session, worker_id: str, state: str) -> str | None:
    """The id of the device that this worker serves; None if another one serves it by now."""
    changed = session.execute(
        update(Device)
        .where(col(Device.worker_id) == worker_id)
        .values(state=state)
        .returning(col(Device.id))
    ).first()
    return None if changed is None else str(changed[0])
