"""How often devices fail, from what the store has seen: it decides how often training saves."""

from __future__ import annotations

from sqlmodel import Session, col, func, select

from shared.lifecycle import FailureClass
from shared.messages import DEVICE_MTBF
from shared.store.engine import after, db_now
from shared.tables import Attempt, Lease

BROKEN = (FailureClass.LOST_WORKER, FailureClass.LOST_DEVICE, FailureClass.INFRASTRUCTURE)
"""Ends that came without a warning and that the spec did not cause: only a checkpoint helps."""
LOOK_BACK = 30 * 86400.0


def device_mtbf(session: Session) -> float:
    """Seconds of a device's work from one failure to the next, by the last 30 days of all devices."""
    since = after(-LOOK_BACK)
    until = func.coalesce(col(Lease.released_at), db_now())
    worked = func.sum(func.extract("epoch", until - col(Lease.claimed_at)))
    seconds = session.exec(select(worked).where(col(Lease.claimed_at) > since)).one()
    failures = session.exec(
        select(func.count())
        .select_from(Attempt)
        .where(col(Attempt.finished_at) > since, col(Attempt.failure_class).in_(BROKEN))
    ).one()
    return estimate_mtbf(failures, float(seconds or 0))


def estimate_mtbf(failures: int, device_seconds: float) -> float:
    """Seconds from one failure to the next, for ``failures`` seen in ``device_seconds`` of work. What is
    assumed of a device that nothing is known of (``DEVICE_MTBF``) counts as one failure seen: so that
    little evidence changes little, and no failure yet does not mean none ever."""
    return (device_seconds + DEVICE_MTBF) / (failures + 1)
