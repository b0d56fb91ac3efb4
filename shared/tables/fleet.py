"""Who computes and who decides: devices, the worker processes that serve them, the leader."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint
from sqlmodel import Field

from shared.tables.base import Table, big_column, json_column, reference, text_column, time_column


class Worker(Table, table=True):
    """One life of the Celery worker process of a device: a new row each time it starts."""

    __tablename__ = "workers"
    id: str = Field(sa_column=text_column(primary_key=True))
    device_id: str = Field(sa_column=text_column(index=True))
    host: str = Field(sa_column=text_column())
    pid: int
    version: str = Field(sa_column=text_column())
    started_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    heartbeat_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))
    ended_at: datetime | None = Field(default=None, sa_column=time_column())


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
    id: str = Field(sa_column=text_column(primary_key=True))
    host: str = Field(sa_column=text_column(index=True))
    worker_id: str = Field(sa_column=reference("workers.id", cascade=False))
    """The worker process that serves it now, or served it last."""
    state: str = Field(default="up", sa_column=text_column())
    """up: takes work. draining: finishes what it has. gone: its worker ended in an orderly way."""
    accelerator: str = Field(sa_column=text_column())
    model: str = Field(sa_column=text_column())
    uuid: str | None = Field(default=None, sa_column=text_column(nullable=True))
    compute_capability: int
    memory_bytes: int = Field(sa_column=big_column())
    queue: str = Field(sa_column=text_column(index=True))
    simulated: bool = False
    warm: list[str] = Field(default=[], sa_column=json_column())
    """Models the engine process holds."""
    suspect_until: datetime | None = Field(default=None, sa_column=time_column())
    """It seems deaf (``scheduler/suspicion.py``): no work until then. Null again once it brings a hint or
    its worker restarts."""
    suspect_reason: str | None = Field(default=None, sa_column=text_column(nullable=True))
    registered_at: datetime = Field(default=None, sa_column=time_column(nullable=False, now=True))


class Leader(Table, table=True):
    """Who may decide. One row; ``term`` rises with each change of leader and fences the old one."""

    __tablename__ = "leader"
    __table_args__ = (CheckConstraint("name = 'scheduler'", name="one"),)
    name: str = Field(sa_column=text_column(primary_key=True))
    holder: str = Field(sa_column=text_column())
    term: int = Field(sa_column=big_column())
    expires_at: datetime = Field(sa_column=time_column(nullable=False))
