"""An attempt under way: its leases, and the hints that are out."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, text
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlmodel import Field

from shared.lifecycle import AttemptState, FailureClass, LeaseState
from shared.tables.base import (
    Table,
    big_column,
    flag_column,
    json_column,
    one_of,
    reference,
    text_column,
    time_column,
)


class Attempt(Table, table=True):
    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint(one_of("state", AttemptState), name="state"),
        CheckConstraint(one_of("failure_class", FailureClass, nullable=True), name="failure_class"),
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
    id: str = Field(sa_column=text_column(primary_key=True))
    job_id: str = Field(sa_column=reference("jobs.id"))
    number: int
    token: int = Field(sa_column=big_column())
    state: str = Field(default=AttemptState.DISPATCHED, sa_column=text_column())
    world_size: int
    """Its ranks; of a batch job, how many it has been given so far."""
    micro_batch: int | None = None
    """What its ranks hold at once, where memory had run out with more before; null: as the spec says."""
    progressed: bool = Field(default=False, sa_column=flag_column())
    """It left something durable that no attempt before it had: a further checkpoint, or results."""
    rendezvous: str | None = Field(default=None, sa_column=text_column(nullable=True))
    """host:port where rank 0 listens."""
    failure_class: str | None = Field(default=None, sa_column=text_column(nullable=True))
    failure: dict[str, Any] | None = Field(default=None, sa_column=json_column(nullable=True))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    started_at: datetime | None = Field(default=None, sa_column=time_column())
    finished_at: datetime | None = Field(default=None, sa_column=time_column())


PLACES = (
    "int8range((hashtextextended(device_id, 0) / 32) * 16 + COALESCE(seat, 0),"
    " (hashtextextended(device_id, 0) / 32) * 16 + COALESCE(seat + 1, 16))"
)
"""Each device as 16 places in a row, at a number that its name hashes to: a seat is one, the whole all."""


class Lease(Table, table=True):
    """The expiring right of one rank to one device, or to a seat of it; unreleased, it reserves that."""

    __tablename__ = "leases"
    __table_args__ = (
        CheckConstraint(one_of("state", LeaseState), name="state"),
        CheckConstraint("(released_at IS NOT NULL) = (state = 'released')", name="released"),
        CheckConstraint("state <> 'held' OR worker_id IS NOT NULL", name="held_by_someone"),
        CheckConstraint("succeeded = false OR state = 'released'", name="succeeded_is_over"),
        CheckConstraint("seat >= 0 AND seat < 16", name="seat"),
        # No device twice, but for seats of their own. An exclusion constraint and not a partial unique
        # index because only the former can be checked at the end of a statement, which the swap in a
        # claim needs, and because only it sees that a whole device is in the way of any seat.
        ExcludeConstraint(
            (text(PLACES), "&&"),
            using="gist",
            where=text("state <> 'released'"),
            deferrable=True,
            initially="IMMEDIATE",
            name="ex_leases_device",
        ),
        Index("ix_leases_open", "expires_at", postgresql_where=text("state <> 'released'")),
        Index("ix_leases_used", "released_at", postgresql_where=text("claimed_at IS NOT NULL")),
    )
    attempt_id: str = Field(sa_column=reference("attempts.id", primary_key=True))
    rank: int = Field(primary_key=True)
    device_id: str = Field(sa_column=reference("devices.id", cascade=False))
    seat: int | None = None
    """Of a batch job: its place beside others that the device computes at once. Null: the whole device."""
    state: str = Field(default=LeaseState.RESERVED, sa_column=text_column())
    worker_id: str | None = Field(default=None, sa_column=text_column(nullable=True))
    succeeded: bool = False
    """This rank ended well."""
    asked_back: bool = Field(default=False, sa_column=flag_column())
    """Of a batch job: the device is wanted for another job, or its worker is being stopped. The rank
    leaves with what it computes now, if others go on."""
    expires_at: datetime = Field(sa_column=time_column(nullable=False))
    created_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    claimed_at: datetime | None = Field(default=None, sa_column=time_column())
    released_at: datetime | None = Field(default=None, sa_column=time_column())


class Outbox(Table, table=True):
    """Hints to publish, one per rank; gone once the rank is claimed or its attempt over."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_due", "due_at"),)
    attempt_id: str = Field(sa_column=reference("attempts.id", primary_key=True))
    rank: int = Field(primary_key=True)
    queue: str = Field(sa_column=text_column())
    label: str = Field(sa_column=text_column())
    """The name Flower shows: kind and model."""
    hint: dict[str, Any] = Field(sa_column=json_column())
    priority: int = 0
    published: int = 0
    """How often; more than once when nobody claimed in time."""
    due_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
