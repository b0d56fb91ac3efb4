"""What attempts report: events, logs, metrics, checkpoints, artifacts, results."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, LargeBinary, text
from sqlmodel import Field

from shared.tables.base import Table, big_column, json_column, reference, text_column, time_column


class Event(Table, table=True):
    """The story of a job, append-only. ``id`` orders all events and is the SSE event id."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job", "job_id", "id"),)
    id: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True))
    job_id: str = Field(sa_column=reference("jobs.id"))
    attempt: int | None = None
    type: str = Field(sa_column=text_column())
    message: str = Field(sa_column=text_column())
    data: dict[str, Any] = Field(default={}, sa_column=json_column())
    at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class LogChunk(Table, table=True):
    """What a rank printed, in pieces; ``id`` orders them and is the SSE event id."""

    __tablename__ = "log_chunks"
    __table_args__ = (Index("ix_log_chunks_job", "job_id", "id"),)
    id: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True))
    job_id: str = Field(sa_column=reference("jobs.id"))
    attempt: int
    rank: int
    text: str = Field(sa_column=text_column())
    at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Metric(Table, table=True):
    __tablename__ = "metrics"
    __table_args__ = (CheckConstraint("split IN ('train', 'validation')", name="split"),)
    job_id: str = Field(sa_column=reference("jobs.id", primary_key=True))
    split: str = Field(sa_column=text_column(primary_key=True))
    step: int = Field(primary_key=True)
    attempt: int
    """A resumed attempt repeats the steps after its checkpoint and overwrites their values."""
    values: dict[str, float] = Field(sa_column=json_column())
    at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Checkpoint(Table, table=True):
    """Committed resumable state; ``path`` is relative to the data folder."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint("step >= 0 AND size >= 0", name="numbers"),
        CheckConstraint("best_step >= 0 AND best_step <= step", name="best_step"),
        Index("uq_checkpoints_step", "attempt_id", "step", unique=True),
        Index("ix_checkpoints_job", "job_id", "step"),
    )
    id: str = Field(sa_column=text_column(primary_key=True))
    job_id: str = Field(sa_column=reference("jobs.id"))
    attempt_id: str = Field(sa_column=reference("attempts.id"))
    token: int = Field(sa_column=big_column())
    step: int
    path: str = Field(sa_column=text_column())
    manifest: dict[str, Any] = Field(sa_column=json_column())
    size: int = Field(sa_column=big_column())
    best_step: int | None = None
    """The step of the best model up to here, which training delivers in the end; its own where this
    checkpoint is that model. Null where training does not stop early."""
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))

    @property
    def best(self) -> bool:
        return self.best_step == self.step


class Artifact(Table, table=True):
    """A deliverable; ``path`` is relative to the data folder. Visible once the job succeeded."""

    __tablename__ = "artifacts"
    __table_args__ = (
        CheckConstraint("size >= 0", name="size"),
        CheckConstraint("name !~ '(^/|(^|/)\\.\\.(/|$))'", name="name_stays_inside"),
        Index("uq_artifacts_name", "attempt_id", "name", unique=True),
        Index("ix_artifacts_job", "job_id"),
    )
    id: str = Field(sa_column=text_column(primary_key=True))
    job_id: str = Field(sa_column=reference("jobs.id"))
    attempt_id: str = Field(sa_column=reference("attempts.id"))
    token: int = Field(sa_column=big_column())
    name: str = Field(sa_column=text_column())
    kind: str = Field(sa_column=text_column())
    path: str = Field(sa_column=text_column())
    size: int = Field(sa_column=big_column())
    sha256: str = Field(sa_column=text_column())
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Shard(Table, table=True):
    """Rows of a batch job that are committed together. ``results`` is gzipped JSONL
    (``shared.rows``): results live in Postgres, so that they and the token are one transaction. The
    shards of a job are all its rows, each once; the order is that of ``first_row``."""

    __tablename__ = "shards"
    __table_args__ = (
        CheckConstraint(
            'rows > 0 AND first_row >= 0 AND length > 0 AND "offset" >= 0', name="numbers"
        ),
        CheckConstraint(
            "(results IS NULL) = (committed_at IS NULL) AND (results IS NULL) = (attempt_id IS NULL)"
            " AND (results IS NULL) = (token IS NULL)",
            name="committed_whole",
        ),
        CheckConstraint(
            "(leased_token IS NULL) = (leased_rank IS NULL) AND deaths >= 0", name="leased_whole"
        ),
        Index("uq_shards_first_row", "job_id", "first_row", unique=True),
        Index(
            "ix_shards_open", "job_id", "first_row", postgresql_where=text("committed_at IS NULL")
        ),
        Index(
            "ix_shards_by_completion",
            "job_id",
            "committed_at",
            "first_row",
            postgresql_where=text("committed_at IS NOT NULL"),
        ),
        Index(
            "ix_shards_committed",
            "committed_at",
            postgresql_where=text("committed_at IS NOT NULL"),
        ),
    )
    job_id: str = Field(sa_column=reference("jobs.id", primary_key=True))
    index: int = Field(primary_key=True)
    first_row: int = Field(sa_column=big_column())
    rows: int
    offset: int = Field(sa_column=big_column())
    length: int = Field(sa_column=big_column())
    leased_token: int | None = Field(default=None, sa_column=big_column(nullable=True))
    leased_rank: int | None = None
    """Which rank of which attempt computes it, or did so last. It counts as long as that attempt is the
    newest and that rank holds its device."""
    deaths: int = Field(default=0, sa_column=big_column(default=0))
    """Engines that died while they computed it. From 1 on it is computed alone."""
    attempt_id: str | None = Field(default=None, sa_column=reference("attempts.id", nullable=True))
    token: int | None = Field(default=None, sa_column=big_column(nullable=True))
    results: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))
    errors: int = 0
    input_tokens: int = Field(default=0, sa_column=big_column(default=0))
    output_tokens: int = Field(default=0, sa_column=big_column(default=0))
    seconds: float = 0.0
    committed_at: datetime | None = Field(default=None, sa_column=time_column())


class RetriedRows(Table, table=True):
    """Of a batch job over rows that failed in another: their numbers in the first input. Rows
    ``first_row`` and following of the job itself, ascending, as packed 64-bit integers."""

    __tablename__ = "retried_rows"
    __table_args__ = (
        CheckConstraint(
            "first_row >= 0 AND last_number >= first_row AND octet_length(numbers) > 0"
            " AND octet_length(numbers) % 8 = 0",
            name="numbers",
        ),
    )
    job_id: str = Field(sa_column=reference("jobs.id", primary_key=True))
    first_row: int = Field(sa_column=Column(BigInteger, primary_key=True))
    last_number: int = Field(sa_column=big_column())
    numbers: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
