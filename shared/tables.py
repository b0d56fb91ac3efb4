"""The tables of the job store (Postgres). Invariants are CHECKs and partial unique indexes here,
so that no code path, also no wrong one, can break them. ``shared/migrations`` is proved equal.

Times are timezone-aware and set by the database's clock, the one clock that all parts share.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, ExcludeConstraint
from sqlmodel import Field, SQLModel

from shared.lifecycle import AttemptState, FailureClass, JobState, LeaseState

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(SQLModel):
    metadata = MetaData(naming_convention=NAMING)


def _one_of(column: str, states: type[StrEnum], *, nullable: bool = False) -> str:
    listed = ", ".join(f"'{state.value}'" for state in states)
    check = f"{column} IN ({listed})"
    return f"{column} IS NULL OR {check}" if nullable else check


def _text(*, primary_key: bool = False, nullable: bool = False, **kw: Any) -> Any:
    return Column(Text, primary_key=primary_key, nullable=nullable, **kw)


def _ref(
    target: str, *, primary_key: bool = False, nullable: bool = False, cascade: bool = True
) -> Any:
    key = ForeignKey(target, ondelete="CASCADE" if cascade else None)
    return Column(Text, key, primary_key=primary_key, nullable=nullable)


def _time(*, nullable: bool = True, now: bool = False) -> Any:
    default = func.clock_timestamp() if now else None
    return Column(DateTime(timezone=True), nullable=nullable, server_default=default)


def _json(*, nullable: bool = False) -> Any:
    return Column(JSONB(none_as_null=True), nullable=nullable)


def _flag() -> Any:
    return Column(Boolean, nullable=False, server_default=text("false"))


def _big(*, nullable: bool = False, default: int | None = None, **kw: Any) -> Any:
    server = None if default is None else text(str(default))
    return Column(BigInteger, nullable=nullable, server_default=server, **kw)


class ApiKey(Table, table=True):
    """Keys are 192 random bits, so one SHA-256 is a sound hash; the key itself is never stored."""

    __tablename__ = "api_keys"
    id: str = Field(sa_column=_text(primary_key=True))
    name: str = Field(sa_column=_text())
    sha256: str = Field(sa_column=_text(unique=True))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    revoked_at: datetime | None = Field(default=None, sa_column=_time())


class File(Table, table=True):
    """An uploaded file, complete and immutable; ``path`` is relative to the data folder."""

    __tablename__ = "files"
    __table_args__ = (CheckConstraint("size >= 0", name="size"),)
    id: str = Field(sa_column=_text(primary_key=True))
    name: str = Field(sa_column=_text())
    size: int = Field(sa_column=_big())
    sha256: str = Field(sa_column=_text())
    path: str = Field(sa_column=_text())
    created_by: str | None = Field(default=None, sa_column=_text(nullable=True))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


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
    key: str = Field(sa_column=_text(primary_key=True))
    configuration: dict[str, Any] = Field(sa_column=_json())
    """``shared.footprint.Configuration``."""
    estimated_bytes: int = Field(sa_column=_big())
    """By arithmetic, when it was submitted first."""
    measured_bytes: int | None = Field(default=None, sa_column=_big(nullable=True))
    peak_bytes: int | None = Field(default=None, sa_column=_big(nullable=True))
    """The most that a rank of a training that succeeded took."""
    exceeded_bytes: int | None = Field(default=None, sa_column=_big(nullable=True))
    """The largest device that was too small."""
    state: str = Field(default="wanted", sa_column=_text(server_default="wanted"))
    tries: int = Field(default=0, sa_column=_big(default=0))
    """How often it was claimed."""
    claimed_by: str | None = Field(default=None, sa_column=_text(nullable=True))
    claimed_at: datetime | None = Field(default=None, sa_column=_time())
    error: str | None = Field(default=None, sa_column=_text(nullable=True))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Job(Table, table=True):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("state", JobState), name="state"),
        CheckConstraint("kind IN ('train', 'infer')", name="kind"),
        CheckConstraint(
            _one_of("failure_class", FailureClass, nullable=True), name="failure_class"
        ),
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
        Index(
            "ix_jobs_waiting_footprint",
            "footprint_key",
            postgresql_where=text("state = 'queued'"),
        ),
    )
    id: str = Field(sa_column=_text(primary_key=True))
    kind: str = Field(sa_column=_text())
    task: str = Field(sa_column=_text())
    name: str | None = Field(default=None, sa_column=_text(nullable=True))
    state: str = Field(default=JobState.QUEUED, sa_column=_text())
    spec: dict[str, Any] = Field(sa_column=_json())
    """As validated, defaults filled in."""
    resolved: dict[str, Any] = Field(sa_column=_json())
    """What submission found: ``shared.resolved.Resolved``."""
    footprint_key: str | None = Field(
        default=None, sa_column=_ref("footprints.key", nullable=True, cascade=False)
    )
    """Of a training: where it is kept what is known about its memory."""
    priority: int = 0
    token: int = Field(default=0, sa_column=_big(default=0))
    """The fencing token of the newest attempt; rises by one with each."""
    micro_batch: int | None = None
    """Of the next attempt at a training, where memory ran out with a larger one."""
    waiting_reason: str | None = Field(default=None, sa_column=_text(nullable=True))
    """Why a queued job does not run yet, written by the scheduler."""
    not_before: datetime | None = Field(default=None, sa_column=_time())
    """A retry waits until then."""
    cancel_requested_at: datetime | None = Field(default=None, sa_column=_time())
    cancel_reason: str | None = Field(default=None, sa_column=_text(nullable=True))
    failure_class: str | None = Field(default=None, sa_column=_text(nullable=True))
    failure: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """``{code, message, hint}`` of the end of a failed job."""
    progress: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """The last ``shared.messages.Progress`` that a live attempt reported."""
    summary: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    """What the job came to: metrics, rows, tokens."""
    idempotency_key: str | None = Field(default=None, sa_column=_text(nullable=True))
    spec_sha256: str = Field(sa_column=_text())
    created_by: str | None = Field(default=None, sa_column=_text(nullable=True))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    started_at: datetime | None = Field(default=None, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time())


class Attempt(Table, table=True):
    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint(_one_of("state", AttemptState), name="state"),
        CheckConstraint(
            _one_of("failure_class", FailureClass, nullable=True), name="failure_class"
        ),
        CheckConstraint("number >= 1 AND token >= 1 AND world_size >= 1", name="numbers"),
        CheckConstraint("micro_batch >= 1", name="micro_batch"),
        CheckConstraint(
            "(finished_at IS NOT NULL) = (state NOT IN ('dispatched', 'running'))",
            name="finished_iff_terminal",
        ),
        CheckConstraint(
            "state NOT IN ('failed', 'lost') OR failure_class IS NOT NULL", name="failed_says_why"
        ),
        Index("uq_attempts_number", "job_id", "number", unique=True),
        Index("uq_attempts_token", "job_id", "token", unique=True),
        Index(
            "uq_attempts_one_active",
            "job_id",
            unique=True,
            postgresql_where=text("state IN ('dispatched', 'running')"),
        ),
    )
    id: str = Field(sa_column=_text(primary_key=True))
    job_id: str = Field(sa_column=_ref("jobs.id"))
    number: int
    token: int = Field(sa_column=_big())
    state: str = Field(default=AttemptState.DISPATCHED, sa_column=_text())
    world_size: int
    micro_batch: int | None = None
    """What its ranks hold at once, where memory had run out with more before; null: as the spec says."""
    progressed: bool = Field(default=False, sa_column=_flag())
    """It left something durable that no attempt before it had: a further checkpoint, or results."""
    rendezvous: str | None = Field(default=None, sa_column=_text(nullable=True))
    """host:port where rank 0 listens."""
    failure_class: str | None = Field(default=None, sa_column=_text(nullable=True))
    failure: dict[str, Any] | None = Field(default=None, sa_column=_json(nullable=True))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    started_at: datetime | None = Field(default=None, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time())


class Worker(Table, table=True):
    """One life of the Celery worker process of a device: a new row each time it starts."""

    __tablename__ = "workers"
    id: str = Field(sa_column=_text(primary_key=True))
    device_id: str = Field(sa_column=_text(index=True))
    host: str = Field(sa_column=_text())
    pid: int
    version: str = Field(sa_column=_text())
    started_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    heartbeat_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    ended_at: datetime | None = Field(default=None, sa_column=_time())


class Device(Table, table=True):
    """One GPU or CPU slot. ``id`` is also the Celery worker's name: ``gpu0@host``."""

    __tablename__ = "devices"
    __table_args__ = (
        CheckConstraint("accelerator IN ('cpu', 'cuda')", name="accelerator"),
        CheckConstraint("state IN ('up', 'draining', 'gone')", name="state"),
        CheckConstraint("memory_bytes > 0 AND compute_capability >= 0", name="numbers"),
        CheckConstraint(
            "(suspect_until IS NULL) = (suspect_reason IS NULL)", name="suspect_says_why"
        ),
    )
    id: str = Field(sa_column=_text(primary_key=True))
    host: str = Field(sa_column=_text(index=True))
    worker_id: str = Field(sa_column=_ref("workers.id", cascade=False))
    """The worker process that serves it now, or served it last."""
    state: str = Field(default="up", sa_column=_text())
    """up: takes work. draining: finishes what it has. gone: its worker ended in an orderly way."""
    accelerator: str = Field(sa_column=_text())
    model: str = Field(sa_column=_text())
    uuid: str | None = Field(default=None, sa_column=_text(nullable=True))
    compute_capability: int
    memory_bytes: int = Field(sa_column=_big())
    queue: str = Field(sa_column=_text(index=True))
    simulated: bool = False
    warm: list[str] = Field(default=[], sa_column=_json())
    """Models the engine process holds."""
    suspect_until: datetime | None = Field(default=None, sa_column=_time())
    """It seems deaf (``scheduler/suspicion.py``): no work until then, nor, at last, until it claims
    something or its worker restarts."""
    suspect_reason: str | None = Field(default=None, sa_column=_text(nullable=True))
    registered_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Lease(Table, table=True):
    """The expiring right of one rank to one device; unreleased, it reserves the device."""

    __tablename__ = "leases"
    __table_args__ = (
        CheckConstraint(_one_of("state", LeaseState), name="state"),
        CheckConstraint("(released_at IS NOT NULL) = (state = 'released')", name="released"),
        CheckConstraint("state <> 'held' OR worker_id IS NOT NULL", name="held_by_someone"),
        CheckConstraint("succeeded = false OR state = 'released'", name="succeeded_is_over"),
        # No device twice. An exclusion constraint and not a partial unique index because only the
        # former can be checked at the end of a statement, which the swap in a claim needs.
        ExcludeConstraint(
            ("device_id", "="),
            using="btree",
            where=text("state <> 'released'"),
            deferrable=True,
            initially="IMMEDIATE",
            name="ex_leases_device",
        ),
        Index("ix_leases_open", "expires_at", postgresql_where=text("state <> 'released'")),
    )
    attempt_id: str = Field(sa_column=_ref("attempts.id", primary_key=True))
    rank: int = Field(primary_key=True)
    device_id: str = Field(sa_column=_ref("devices.id", cascade=False))
    state: str = Field(default=LeaseState.RESERVED, sa_column=_text())
    worker_id: str | None = Field(default=None, sa_column=_text(nullable=True))
    succeeded: bool = False
    """This rank ended well."""
    expires_at: datetime = Field(sa_column=_time(nullable=False))
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    claimed_at: datetime | None = Field(default=None, sa_column=_time())
    released_at: datetime | None = Field(default=None, sa_column=_time())


class Outbox(Table, table=True):
    """Hints to publish, one per rank; gone once the rank is claimed or its attempt over."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_due", "due_at"),)
    attempt_id: str = Field(sa_column=_ref("attempts.id", primary_key=True))
    rank: int = Field(primary_key=True)
    queue: str = Field(sa_column=_text())
    label: str = Field(sa_column=_text())
    """The name Flower shows: kind and model."""
    hint: dict[str, Any] = Field(sa_column=_json())
    priority: int = 0
    published: int = 0
    """How often; more than once when nobody claimed in time."""
    due_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Event(Table, table=True):
    """The story of a job, append-only. ``id`` orders all events and is the SSE event id."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job", "job_id", "id"),)
    id: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True))
    job_id: str = Field(sa_column=_ref("jobs.id"))
    attempt: int | None = None
    type: str = Field(sa_column=_text())
    message: str = Field(sa_column=_text())
    data: dict[str, Any] = Field(default={}, sa_column=_json())
    at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class LogChunk(Table, table=True):
    """What a rank printed, in pieces; ``id`` orders them and is the SSE event id."""

    __tablename__ = "log_chunks"
    __table_args__ = (Index("ix_log_chunks_job", "job_id", "id"),)
    id: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True))
    job_id: str = Field(sa_column=_ref("jobs.id"))
    attempt: int
    rank: int
    text: str = Field(sa_column=_text())
    at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Metric(Table, table=True):
    __tablename__ = "metrics"
    __table_args__ = (CheckConstraint("split IN ('train', 'validation')", name="split"),)
    job_id: str = Field(sa_column=_ref("jobs.id", primary_key=True))
    split: str = Field(sa_column=_text(primary_key=True))
    step: int = Field(primary_key=True)
    attempt: int
    """A resumed attempt repeats the steps after its checkpoint and overwrites their values."""
    values: dict[str, float] = Field(sa_column=_json())
    at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Checkpoint(Table, table=True):
    """Committed resumable state; ``path`` is relative to the data folder."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint("step >= 0 AND size >= 0", name="numbers"),
        CheckConstraint("best_step >= 0 AND best_step <= step", name="best_step"),
        Index("uq_checkpoints_step", "attempt_id", "step", unique=True),
        Index("ix_checkpoints_job", "job_id", "step"),
    )
    id: str = Field(sa_column=_text(primary_key=True))
    job_id: str = Field(sa_column=_ref("jobs.id"))
    attempt_id: str = Field(sa_column=_ref("attempts.id"))
    token: int = Field(sa_column=_big())
    step: int
    path: str = Field(sa_column=_text())
    manifest: dict[str, Any] = Field(sa_column=_json())
    size: int = Field(sa_column=_big())
    best_step: int | None = None
    """The step of the best model up to here, which training delivers in the end; its own where this
    checkpoint is that model. Null where training does not stop early."""
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))

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
    id: str = Field(sa_column=_text(primary_key=True))
    job_id: str = Field(sa_column=_ref("jobs.id"))
    attempt_id: str = Field(sa_column=_ref("attempts.id"))
    token: int = Field(sa_column=_big())
    name: str = Field(sa_column=_text())
    kind: str = Field(sa_column=_text())
    path: str = Field(sa_column=_text())
    size: int = Field(sa_column=_big())
    sha256: str = Field(sa_column=_text())
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class Shard(Table, table=True):
    """Rows of a batch job that are committed together. ``results`` is gzipped JSONL
    (``shared.rows``): results live in Postgres, so that they and the token are one transaction."""

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
        Index("ix_shards_open", "job_id", "index", postgresql_where=text("committed_at IS NULL")),
    )
    job_id: str = Field(sa_column=_ref("jobs.id", primary_key=True))
    index: int = Field(primary_key=True)
    first_row: int = Field(sa_column=_big())
    rows: int
    offset: int = Field(sa_column=_big())
    length: int = Field(sa_column=_big())
    attempt_id: str | None = Field(default=None, sa_column=_ref("attempts.id", nullable=True))
    token: int | None = Field(default=None, sa_column=_big(nullable=True))
    results: bytes | None = Field(default=None, sa_column=Column(LargeBinary, nullable=True))
    errors: int = 0
    input_tokens: int = Field(default=0, sa_column=_big(default=0))
    output_tokens: int = Field(default=0, sa_column=_big(default=0))
    seconds: float = 0.0
    committed_at: datetime | None = Field(default=None, sa_column=_time())


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
    name: str = Field(sa_column=_text(primary_key=True))
    version: int = Field(primary_key=True)
    job_id: str = Field(sa_column=_ref("jobs.id"))
    task: str = Field(sa_column=_text())
    stage: str | None = Field(default=None, sa_column=_text(nullable=True))
    metrics: dict[str, Any] = Field(sa_column=_json())
    tags: list[str] = Field(default=[], sa_column=_json())
    created_by: str = Field(default="", sa_column=_text())
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))
    deleted_at: datetime | None = Field(default=None, sa_column=_time())


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
    id: str = Field(sa_column=_text(primary_key=True))
    name: str | None = Field(default=None, sa_column=_text(nullable=True))
    spec: dict[str, Any] = Field(sa_column=_json())
    spec_sha256: str = Field(sa_column=_text())
    idempotency_key: str | None = Field(default=None, sa_column=_text(nullable=True))
    created_by: str = Field(default="", sa_column=_text())
    created_at: datetime = Field(default=None, sa_column=_time(nullable=False, now=True))


class SweepTrial(Table, table=True):
    """One job of a sweep, and what is particular to it."""

    __tablename__ = "sweep_trials"
    __table_args__ = (
        CheckConstraint("number >= 1", name="number"),
        Index("uq_sweep_trials_job", "job_id", unique=True),
    )
    sweep_id: str = Field(sa_column=_ref("sweeps.id", primary_key=True))
    number: int = Field(primary_key=True)
    job_id: str = Field(sa_column=_ref("jobs.id"))
    parameters: dict[str, Any] = Field(sa_column=_json())


class Leader(Table, table=True):
    """Who may decide. One row; ``term`` rises with each change of leader and fences the old one."""

    __tablename__ = "leader"
    __table_args__ = (CheckConstraint("name = 'scheduler'", name="one"),)
    name: str = Field(sa_column=_text(primary_key=True))
    holder: str = Field(sa_column=_text())
    term: int = Field(sa_column=_big())
    expires_at: datetime = Field(sa_column=_time(nullable=False))
