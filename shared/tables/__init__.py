"""The tables of the job store (Postgres), by what happens to a job.

Invariants are CHECKs and partial unique indexes here, so that no code path, also no wrong one, can
break them. ``shared/migrations`` is proved equal. Times are timezone-aware and set by the database's
clock, the one clock that all parts share.
"""

from __future__ import annotations

from shared.tables.base import Table
from shared.tables.dispatch import Attempt, Lease, Outbox
from shared.tables.fleet import Device, Leader, Worker
from shared.tables.outcomes import PublishedModel, Sweep, SweepTrial
from shared.tables.reports import (
    Artifact,
    Checkpoint,
    Event,
    LogChunk,
    Metric,
    RetriedRows,
    Shard,
)
from shared.tables.submission import ApiKey, File, Footprint, Job

__all__ = [
    "ApiKey",
    "Artifact",
    "Attempt",
    "Checkpoint",
    "Device",
    "Event",
    "File",
    "Footprint",
    "Job",
    "Leader",
    "Lease",
    "LogChunk",
    "Metric",
    "Outbox",
    "PublishedModel",
    "RetriedRows",
    "Shard",
    "Sweep",
    "SweepTrial",
    "Table",
    "Worker",
]
