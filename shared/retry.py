"""The retry policy: what follows the end of an attempt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.lifecycle import FailureClass
from shared.specs import Retry

_FINAL = {
    FailureClass.USER_ERROR: "the same spec would fail the same way",
    FailureClass.DATA_ERROR: "the same data would fail the same way",
    FailureClass.CANCELLED: "the job was cancelled",
    FailureClass.DEADLINE: "its time limit was reached",
}
_FREE = frozenset({FailureClass.PREEMPTED, FailureClass.UNCLAIMED})
"""Ends in which the job was not at fault and nothing broke in it: they cost no try."""
MAX_BACKOFF = 300.0
MAX_OUT_OF_MEMORY = 2


@dataclass(frozen=True, slots=True)
class TryAgain:
    after_seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def decide(policy: Retry, failures: Sequence[FailureClass]) -> TryAgain | GiveUp:
    """What follows the newest of ``failures`` (oldest first, one per ended attempt of the job).

    User and data errors, cancellation and deadlines are final. Out of memory is tried once more, in
    case something else held the memory. Everything else is tried again until ``max_attempts``, with
    a delay that doubles; preemptions and unclaimed attempts count for nothing.
    """
    newest = failures[-1]
    if newest in _FINAL:
        return GiveUp(f"{newest}: {_FINAL[newest]}")
    if newest in _FREE:
        return TryAgain(0.0, f"{newest}: costs no try")
    counted = [f for f in failures if f not in _FREE]
    if len(counted) >= policy.max_attempts:
        return GiveUp(f"{newest}: all {policy.max_attempts} attempts are used up")
    if counted.count(FailureClass.OUT_OF_MEMORY) >= MAX_OUT_OF_MEMORY:
        return GiveUp(f"{newest}: it ran out of memory {MAX_OUT_OF_MEMORY} times")
    delay = min(policy.backoff_seconds * 2 ** min(len(counted) - 1, 30), MAX_BACKOFF)
    return TryAgain(delay, f"{newest}: attempt {len(counted)} of {policy.max_attempts} failed")
