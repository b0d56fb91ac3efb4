"""Dispatch: make a placement true. Commit first; the broker hears of it from the outbox."""

from __future__ import annotations

import logging

from scheduler.placement import Placement
from shared.settings import Settings
from shared.store import Store
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.snapshot import WaitingJob

log = logging.getLogger(__name__)


def dispatch(
    store: Store, term: int, job: WaitingJob, placement: Placement, settings: Settings
) -> bool:
    """Commit an attempt on the chosen devices. False: the world has changed since the snapshot, and
    the next tick decides anew.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    placed = [Placed(d, q) for d, q in zip(placement.devices, placement.queues, strict=True)]
    attempt = store.call(
        dispatch_attempt,
        term,
        job.id,
        placed,
        label=job.label,
        claim_timeout=settings.claim_timeout,
        device_timeout=settings.device_timeout,
        reason=placement.reason,
    )
    if attempt is None:
        log.info("%s was not dispatched: its state, its devices or the leader changed", job.id)
        return False
    log.info(
        "%s attempt %d -> %s (%s)",
        job.id, attempt.number, ", ".join(placement.devices), placement.reason,
    )  # fmt: skip
    return True
