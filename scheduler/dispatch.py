"""Dispatch: make decisions true. Commit first; the broker hears of it from the outbox."""

from __future__ import annotations

import logging

from scheduler.growth import AskBack, Growth
from scheduler.placement import Placement
from shared.settings import Settings
from shared.store import Store
from shared.store.dispatch import Placed, dispatch_attempt
from shared.store.growth import ask_back_rank, grow_attempt
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
    placed = [
        Placed(device, queue, placement.shared)
        for device, queue in zip(placement.devices, placement.queues, strict=True)
    ]
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


def enlarge(store: Store, term: int, growth: Growth, settings: Settings) -> bool:
    """Give a running batch job one rank more. False: the world has changed since the snapshot.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    batch = growth.batch
    rank = store.call(
        grow_attempt,
        term,
        batch.running,
        Placed(growth.device_id, growth.queue),
        label=batch.label,
        most=batch.requirements.most,
        claim_timeout=settings.claim_timeout,
        device_timeout=settings.device_timeout,
        reason=growth.reason,
    )
    if rank is None:
        log.info("%s was not given %s: something changed", batch.id, growth.device_id)
        return False
    log.info("%s rank %d -> %s (%s)", batch.id, rank, growth.device_id, growth.reason)
    return True


def shrink(store: Store, term: int, asked: AskBack) -> bool:
    """Ask a running batch job for a rank. False: the world has changed since the snapshot.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    done = store.call(ask_back_rank, term, asked.batch.running, asked.rank, asked.reason)
    if done:
        log.info("%s is asked for rank %d: %s", asked.batch.id, asked.rank, asked.reason)
    return done
