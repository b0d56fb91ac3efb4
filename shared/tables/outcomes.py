"""What is made of jobs: published models, and sweeps with their trials."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, text
from sqlmodel import Field

from shared.tables.base import Table, json_column, reference, text_column, time_column


class PublishedModel(Table, table=True):
    """A version of a named model: which job made it. Rows stay when they are deleted, so that a
    number is never given twice."""

    __tablename__ = "published_models"
    __table_args__ = (
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint(
            "stage IS NULL OR stage IN ('staging', 'production', 'archived')", name="stage"
        ),
        CheckConstraint(
            "stage IS DISTINCT FROM 'production' OR deleted_at IS NULL", name="production_is_there"
        ),
        Index(
            "uq_published_models_production",
            "name",
            unique=True,
            postgresql_where=text("stage = 'production'"),
        ),
        Index(
            "uq_published_models_job",
            "name",
            "job_id",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
    )
    name: str = Field(sa_column=text_column(primary_key=True))
    version: int = Field(primary_key=True)
    job_id: str = Field(sa_column=reference("jobs.id"))
    task: str = Field(sa_column=text_column())
    stage: str | None = Field(default=None, sa_column=text_column(nullable=True))
    metrics: dict[str, Any] = Field(sa_column=json_column())
    tags: list[str] = Field(default=[], sa_column=json_column())
    created_by: str = Field(default="", sa_column=text_column())
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    deleted_at: datetime | None = Field(default=None, sa_column=time_column())


class Sweep(Table, table=True):
    """A hyperparameter sweep; its trials are jobs."""

    __tablename__ = "sweeps"
    __table_args__ = (
        Index(
            "uq_sweeps_idempotency",
            "created_by",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )
    id: str = Field(sa_column=text_column(primary_key=True))
    name: str | None = Field(default=None, sa_column=text_column(nullable=True))
    spec: dict[str, Any] = Field(sa_column=json_column())
    spec_sha256: str = Field(sa_column=text_column())
    idempotency_key: str | None = Field(default=None, sa_column=text_column(nullable=True))
    created_by: str = Field(default="", sa_column=text_column())
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class SweepTrial(Table, table=True):
    """One job of a sweep, and what is particular to it."""

    __tablename__ = "sweep_trials"
    __table_args__ = (
        CheckConstraint("number >= 1", name="number"),
        Index("uq_sweep_trials_job", "job_id", unique=True),
    )
    sweep_id: str = Field(sa_column=reference("sweeps.id", primary_key=True))
    number: int = Field(primary_key=True)
    job_id: str = Field(sa_column=reference("jobs.id"))
    parameters: dict[str, Any] = Field(sa_column=json_column())
