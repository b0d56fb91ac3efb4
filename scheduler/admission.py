"""Admission: which waiting jobs may go to placement now, and in which order. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from shared.store.snapshot import WaitingJob


@dataclass(frozen=True, slots=True)
class Admission:
    """``ready`` in the order of placement; ``held_back`` says why, by job id."""

    ready: tuple[WaitingJob, ...]
    held_back: dict[str, str]


def order(jobs: Iterable[WaitingJob]) -> list[WaitingJob]:
    """Strict priority, then age. The one function that says who goes first."""
    return sorted(jobs, key=lambda job: (-job.priority, job.created_at, job.id))


def admit(jobs: Iterable[WaitingJob], now: datetime) -> Admission:
    """Hold back what must not start yet; order the rest. ``now`` is by the database's clock."""
    ready: list[WaitingJob] = []
    held_back: dict[str, str] = {}
    for job in jobs:
        reason = _not_yet(job, now)
        if reason is None:
            ready.append(job)
        else:
            held_back[job.id] = reason
    return Admission(tuple(order(ready)), held_back)


def _not_yet(job: WaitingJob, now: datetime) -> str | None:
    if job.not_before is not None and job.not_before > now:
        return f"tried again in {math.ceil((job.not_before - now).total_seconds())} s"
    if job.ranks_ending:
        # Two attempts of one job at once would compete for its devices and its work folder.
        return "ranks of its last attempt are still ending"
    return None
