"""Views as text and tables for people."""

from __future__ import annotations

from gpuyard.cli.render.devices import fleet, suspicion
from gpuyard.cli.render.layout import Column, fields, fit, state, table
from gpuyard.cli.render.products import artifacts, checkpoints, files, models
from gpuyard.cli.render.usage import usage
from gpuyard.cli.render.variants import best, standing, sweeps, trials
from gpuyard.cli.render.words import age, clock, date, duration, number, size
from gpuyard.cli.render.work import (
    attempts,
    event,
    job_fields,
    jobs,
    needs,
    pace,
    percent,
    remark,
    standing_of,
    summary,
    time_left,
    wrapped,
)

__all__ = [
    "Column",
    "age",
    "artifacts",
    "attempts",
    "best",
    "checkpoints",
    "clock",
    "date",
    "duration",
    "event",
    "fields",
    "files",
    "fit",
    "fleet",
    "job_fields",
    "jobs",
    "models",
    "needs",
    "number",
    "pace",
    "percent",
    "remark",
    "size",
    "standing",
    "standing_of",
    "state",
    "summary",
    "suspicion",
    "sweeps",
    "table",
    "time_left",
    "trials",
    "usage",
    "wrapped",
]
