"""What is submitted: who may, files, jobs, and what is known of their memory."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, text
from sqlmodel import Field

from shared.lifecycle import FailureClass, JobState
from shared.tables.base import (
    Table,
    big_column,
    json_column,
    one_of,
    reference,
    text_column,
    time_column,
)

DEFAULT_PROJECT = "default"
"""Of keys that are made without one, and of jobs without a key."""


class ApiKey(Table, table=True):
    """Keys are 192 random bits, so one SHA-256 is a sound hash; the key itself is never stored."""

    __tablename__ = "api_keys"
    id: str = Field(sa_column=text_column(primary_key=True))
    name: str = Field(sa_column=text_column())
    project: str = Field(
        default=DEFAULT_PROJECT, sa_column=text_column(server_default=DEFAULT_PROJECT)
    )
    """What its jobs count for; for good."""
    sha256: str = Field(sa_column=text_column(unique=True))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    revoked_at: datetime | None = Field(default=None, sa_column=time_column())


class File(Table, table=True):
    """An uploaded file, complete and immutable; ``path`` is relative to the data folder."""

    __tablename__ = "files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"),)
    id: str = Field(sa_column=text_column(primary_key=True))
    name: str = Field(sa_column=text_column())
    size: int = Field(sa_column=big_column())
    sha256: str = Field(sa_column=text_column())
    path: str = Field(sa_column=text_column())
    created_by: str | None = Field(default=None, sa_column=text_column(nullable=True))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Footprint(Table, table=True):
    """What is known about the memory of a configuration of trainings, by rank, in bytes.

    States: wanted, until a worker claims it (``claim_measurement``); measuring, until that worker says
    measured or failed (``record_measurement``, ``fail_measurement``), or its claim expires and another
    one claims it. Measured and failed are final. The other figures come at any time.
    """

    __tablename__ = "footprints"
    __table_args__ = (
        CheckConstraint("state IN ('wanted', 'measuring', 'measured', 'failed')", name="state"),
        CheckConstraint(
            "(measured_bytes IS NOT NULL) = (state = 'measured')", name="measured_iff_known"
        ),
        CheckConstraint("(error IS NOT NULL) = (state = 'failed')", name="failed_says_why"),
        CheckConstraint(
            "(claimed_by IS NOT NULL) = (state = 'measuring')"
            " AND (claimed_at IS NOT NULL) = (state = 'measuring')",
            name="claimed_iff_measuring",
        ),
        CheckConstraint(
            "estimated_bytes > 0 AND measured_bytes > 0 AND peak_bytes > 0"
            " AND exceeded_bytes > 0 AND tries >= 0",
            name="numbers",
        ),
        Index(
            "ix_footprints_open",
            "created_at",
            postgresql_where=text("state IN ('wanted', 'measuring')"),
        ),
    )
    key: str = Field(sa_column=text_column(primary_key=True))
    configuration: dict[str, Any] = Field(sa_column=json_column())
    """``shared.footprint.Configuration``."""
    estimated_bytes: int = Field(sa_column=big_column())
    """By arithmetic, when it was submitted first."""
    measured_bytes: int | None = Field(default=None, sa_column=big_column(nullable=True))
    peak_bytes: int | None = Field(default=None, sa_column=big_column(nullable=True))
    """The most that a rank of a training that succeeded took."""
    exceeded_bytes: int | None = Field(default=None, sa_column=big_column(nullable=True))
    """The largest device that was too small."""
    state: str = Field(default="wanted", sa_column=text_column(server_default="wanted"))
    tries: int = Field(default=0, sa_column=big_column(default=0))
    """How often it was claimed."""
    claimed_by: str | None = Field(default=None, sa_column=text_column(nullable=True))
    claimed_at: datetime | None = Field(default=None, sa_column=time_column())
    error: str | None = Field(default=None, sa_column=text_column(nullable=True))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Job(Table, table=True):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(one_of("state", JobState), name="state"),
        CheckConstraint("kind IN ('train', 'infer')", name="kind"),
        CheckConstraint(one_of("failure_class", FailureClass, nullable=True), name="failure_class"),
        CheckConstraint(
            "(finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))",
            name="finished_iff_terminal",
        ),
        CheckConstraint("state <> 'failed' OR failure_class IS NOT NULL", name="failed_says_why"),
        CheckConstraint(
            "state <> 'cancelling' OR cancel_requested_at IS NOT NULL", name="cancelling_was_asked"
        ),
        CheckConstraint("token >= 0", name="token"),
        CheckConstraint("micro_batch >= 1", name="micro_batch"),
        Index(
            "uq_jobs_idempotency",
            "created_by",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
        Index(
            "ix_jobs_waiting",
            text("priority DESC"),
            "created_at",
            postgresql_where=text("state = 'queued'"),
        ),
        Index("ix_jobs_state_id", "state", "id"),
        Index("ix_jobs_created_at", "created_at"),
        Index(
            "ix_jobs_waiting_footprint",
            "footprint_key",
            postgresql_where=text("state = 'queued'"),
        ),
    )
    id: str = Field(sa_column=text_column(primary_key=True))
    kind: str = Field(sa_column=text_column())
    task: str = Field(sa_column=text_column())
    name: str | None = Field(default=None, sa_column=text_column(nullable=True))
    state: str = Field(default=JobState.QUEUED, sa_column=text_column())
    spec: dict[str, Any] = Field(sa_column=json_column())
    """As validated, defaults filled in."""
    resolved: dict[str, Any] = Field(sa_column=json_column())
    """What submission found: ``shared.resolved.Resolved``."""
    footprint_key: str | None = Field(
        default=None, sa_column=reference("footprints.key", nullable=True, cascade=False)
    )
    """Of a training: where it is kept what is known about its memory."""
    priority: int = 0
    token: int = Field(default=0, sa_column=big_column(default=0))
    """The fencing token of the newest attempt; rises by one with each."""
    micro_batch: int | None = None
    """Of the next attempt at a training, where memory ran out with a larger one."""
    waiting_reason: str | None = Field(default=None, sa_column=text_column(nullable=True))
    """Why a queued job does not run yet, written by the scheduler."""
    not_before: datetime | None = Field(default=None, sa_column=time_column())
    """A retry waits until then."""
    cancel_requested_at: datetime | None = Field(default=None, sa_column=time_column())
    cancel_reason: str | None = Field(default=None, sa_column=text_column(nullable=True))
    failure_class: str | None = Field(default=None, sa_column=text_column(nullable=True))
    failure: dict[str, Any] | None = Field(default=None, sa_column=json_column(nullable=True))
    """``{code, message, hint}`` of the end of a failed job."""
    progress: dict[str, Any] | None = Field(default=None, sa_column=json_column(nullable=True))
    """The last ``shared.messages.Progress`` that a live attempt reported."""
    summary: dict[str, Any] | None = Field(default=None, sa_column=json_column(nullable=True))
    """What the job came to: metrics, rows, tokens."""
    idempotency_key: str | None = Field(default=None, sa_column=text_column(nullable=True))
    spec_sha256: str = Field(sa_column=text_column())
    retry_of: str | None = Field(
        default=None, sa_column=reference("jobs.id", nullable=True, cascade=False)
    )
    """The job whose spec, or whose failed rows, this one runs again."""
    created_by: str | None = Field(default=None, sa_column=text_column(nullable=True))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    started_at: datetime | None = Field(default=None, sa_column=time_column())
    finished_at: datetime | None = Field(default=None, sa_column=time_column())
