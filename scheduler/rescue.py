"""Rescue: which expired leases to take back, and taking them back.

A lease that ran out while its holder could not reach Postgres says nothing about the holder. So an
outage that we know of, of the server or of our own way to it, gives every lease a full term from its
end before it counts as run out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

from scheduler.suspicion import judge
from shared.settings import Settings
from shared.store import Store
from shared.store.rescue import (
    Expired,
    ExpiredLease,
    Suspect,
    expired_leases,
    rescue_lease,
    unclaimed,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contact:
    """Since when Postgres has answered without a gap, by its own clock.

    ``longest_gap`` seconds without an answer break the contact: Postgres was away, or this process
    (with the whole machine, perhaps: a suspended laptop) stood still.
    """

    longest_gap: float
    since: datetime | None = None
    last: datetime | None = None

    def answered(self, now: datetime) -> Contact:
        gap = self.last is None or now - self.last > timedelta(seconds=self.longest_gap)
        return Contact(self.longest_gap, now if gap or self.since is None else self.since, now)

    def lost(self) -> Contact:
        return Contact(self.longest_gap)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one expired lease."""

    lease: ExpiredLease
    rescue: bool
    reason: str


def decide(expired: Expired, contact_since: datetime, lease_ttl: float) -> list[Verdict]:
    """Rescue each lease that ran out although its holder could have renewed it. Pure.

    ``contact_since``: since when this scheduler reaches Postgres without a gap.
    """
    back = max(expired.postgres_up_since, contact_since)
    ready_at = back + timedelta(seconds=lease_ttl)
    verdicts = []
    for lease in expired.leases:
        left = (ready_at - expired.now).total_seconds()
        if left > 0:
            reason = f"Postgres was away: its holder has {left:.0f} s more to renew it"
        elif lease.attempt_over:
            reason = "its attempt is over and its worker did not release it"
        elif lease.held:
            reason = "its worker did not renew it"
        else:
            reason = "nobody claimed it"
        verdicts.append(Verdict(lease, rescue=left <= 0, reason=reason))
    return verdicts


def rescue_expired(store: Store, term: int, contact_since: datetime, settings: Settings) -> int:
    """Take back what ``decide`` says; how many leases that were. A device that should have claimed
    one, and seems deaf, is passed over from then on.

    Raises:
        Unavailable: Postgres cannot be reached.
    """
    expired = store.call(expired_leases)
    rescued = 0
    for verdict in decide(expired, contact_since, settings.lease_ttl):
        lease = verdict.lease
        if not verdict.rescue:
            continue
        suspect = None if lease.held else _suspect(store, lease, settings)
        if store.call(rescue_lease, term, lease, suspect):
            rescued += 1
            log.warning(
                "rescued rank %d of %s from %s: %s",
                lease.rank, lease.attempt_id, lease.device_id, verdict.reason,
            )  # fmt: skip
            if suspect is not None:
                log.warning("%s seems deaf: %s", lease.device_id, suspect.reason)
    return rescued


def _suspect(store: Store, lease: ExpiredLease, settings: Settings) -> Suspect | None:
    seen = store.call(unclaimed, lease, settings.device_timeout)
    if seen is None:
        return None
    suspicion = judge(seen)
    if not suspicion.suspect:
        return None
    return Suspect(seen.worker_id, suspicion.reason, settings.suspect_for)
