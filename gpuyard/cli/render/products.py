"""What jobs use and leave: files, checkpoints, artifacts, models."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpuyard.cli.render.layout import Column, table
from gpuyard.cli.render.words import age, size
from shared.views import ArtifactView, CheckpointView, FileView, ModelView


def models(console: Console, items: Sequence[ModelView]) -> Table:
    columns = [
        Column("MODEL", whole=True),
        Column("STAGE", 50),
        Column("TASK", 70),
        Column("METRICS", 90),
        Column("AGE", 80),
        Column("TAGS", 120),
        Column("JOB", 110),
    ]
    rows = []
    for m in items:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(m.metrics.items())[:3])
        tags = ", ".join(m.tags)
        rows.append((m.reference, m.stage or "-", m.task, shown, age(m.created_at), tags, m.job_id))
    return table(console, columns, rows)


def files(console: Console, items: Sequence[FileView]) -> Table:
    columns = [
        Column("FILE", whole=True),
        Column("SIZE", whole=True, right=True),
        Column("AGE", 60),
        Column("SHA-256", 120),
        Column("NAME"),
    ]
    rows = [(f.id, size(f.size), age(f.created_at), f.sha256[:16], f.name) for f in items]
    return table(console, columns, rows)


def artifacts(console: Console, items: Sequence[ArtifactView]) -> Table:
    columns = [
        Column("ARTIFACT", whole=True),
        Column("KIND", 60),
        Column("SIZE", whole=True, right=True),
        Column("SHA-256", 80),
        Column("PATH ON THE SERVICE", 140),
    ]
    rows = [(a.name, a.kind, size(a.size), a.sha256[:16], a.path) for a in items]
    return table(console, columns, rows)


def checkpoints(console: Console, items: Sequence[CheckpointView]) -> Table:
    columns = [
        Column("CHECKPOINT", whole=True),
        Column("STEP", whole=True, right=True),
        Column("BEST", whole=True),
        Column("SIZE", 60, right=True),
        Column("AGE", 80),
        Column("PATH ON THE SERVICE", 140),
    ]
    rows = [
        (c.id, c.step, "best" if c.best else "", size(c.size), age(c.created_at), c.path)
        for c in items
    ]
    return table(console, columns, rows)
