"""Jobs: how they stand, what they need and came to, their attempts and events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuyard.cli.render.layout import Column, fields, state, table
from gpuyard.cli.render.words import age, clock, date, duration, number, one_line, size
from shared.lifecycle import AttemptState, JobState
from shared.views import AttemptView, EventView, JobDetail, JobView


def percent(job: JobView) -> str:
    progress = job.progress
    if job.state is JobState.SUCCEEDED:
        return "100%"
    if progress is None or not progress.total_steps:
        return ""
    return f"{min(100, 100 * progress.step // progress.total_steps)}%"


def remark(job: JobView) -> str:
    """What is worth knowing about a job in one line: why it waits or why it failed."""
    if job.failure is not None and job.state is JobState.FAILED:
        return f"{job.failure.code}: {job.failure.message}"
    if not job.state.terminal and job.waiting_reason and not job.state.active:
        return job.waiting_reason
    return ""


def jobs(console: Console, items: Sequence[JobView]) -> Table:
    """One line a job. Where one has a reason to tell, that goes before what the job is."""
    explained = any(remark(job) for job in items)
    columns = [
        Column("JOB", whole=True),
        Column("STATE", whole=True),
        Column("DONE", 50, right=True),
        Column("AGE", 60),
        Column("TASK", 150 if explained else 80),
        Column("MODEL", 130 if explained else 100),
        Column("NAME", 110 if explained else 120),
    ]
    rows = [
        [
            job.id,
            state(job.state),
            percent(job),
            age(job.created_at),
            job.task if job.kind == "infer" else f"train {job.task}",
            job.model,
            job.name,
        ]
        for job in items
    ]
    if explained:
        columns.append(Column("REASON", 70))
        for row, job in zip(rows, items, strict=True):
            row.append(remark(job))
    return table(console, columns, rows)


def job_fields(job: JobDetail) -> Table:
    """All about a job but its attempts and events."""
    progress = job.progress
    took = None
    if job.started_at is not None:
        end = job.finished_at or datetime.now(job.started_at.tzinfo)
        took = duration((end - job.started_at).total_seconds())
    failure = job.failure if job.state is JobState.FAILED else None
    return fields(
        [
            ("job", job.id),
            ("name", job.name),
            ("state", state(job.state)),
            ("waits for", remark(job) if job.state is JobState.QUEUED else None),
            ("failed", f"{failure.message} [{failure.failure_class}: {failure.code}]" if failure else None),
            ("hint", failure.hint if failure else None),
            ("retry of", job.retry_of),
            ("task", f"{job.kind} {job.task}"),
            ("model", job.model),
            ("needs", needs(job.requirements)),
            ("priority", job.priority or None),
            ("progress", pace(job) if progress else None),
            ("submitted", date(job.created_at)),
            ("started", date(job.started_at)),
            ("finished", date(job.finished_at)),
            ("took", took),
            ("device time", duration(job.device_seconds) if job.device_seconds else None),
            ("result", summary(job)),
        ]
    )  # fmt: skip


_FOUND = {
    "estimate": ", estimated",
    "measured": ", measured without weights",
    "remembered": ", remembered from earlier runs",
}


def needs(requirements: dict[str, Any]) -> str:
    """Requirements in words, those that ask for something."""
    least = requirements.get("devices") or 1
    most = max(requirements.get("world_sizes") or (requirements.get("most") or least,))
    parts = [f"{least} to {most} devices" if most > least else f"{least} device{'s'[: least > 1]}"]
    if requirements.get("accelerator") not in (None, "auto"):
        parts.append(str(requirements["accelerator"]))
    if memory := requirements.get("memory_bytes"):
        found = _FOUND.get(str(requirements.get("memory_from")), "")
        parts.append(f"{size(memory)} each{found}")
    if capability := requirements.get("compute_capability"):
        parts.append(f"compute capability {capability / 10:g}")
    parts += requirements.get("features") or []
    return " · ".join(parts)


_TOLD_ELSEWHERE = ("done", "peak_memory_bytes", "device_seconds")
"""Of a summary; ``done`` of a batch job that ended well are all rows."""


def summary(job: JobView) -> str:
    """The numbers a job ended with."""
    came_to = job.summary or {}
    parts = [
        f"{name.replace('_', ' ')} {number(value)}"
        for name, value in came_to.items()
        if isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and name not in _TOLD_ELSEWHERE
    ]
    if peak := came_to.get("peak_memory_bytes"):
        parts.append(f"peak memory {size(peak)}")
    if came_to.get("stopped_early"):
        parts.append("stopped early")
    if best := came_to.get("best"):
        what = str(best["metric"]).replace("_", " ")
        parts.append(f"best {what} {number(best['value'])} at step {best['step']}")
    return " · ".join(parts)


def pace(job: JobDetail, rows_per_second: float | None = None) -> str:
    """Where the work stands, in one line: steps, what is measured, speed, time left."""
    return " · ".join((*standing_of(job, rows_per_second), *filter(None, [time_left(job)])))


def time_left(job: JobDetail) -> str:
    """``ETA 3 m 05 s`` of a job that is not over, where that is known."""
    eta = job.progress.eta_seconds if job.progress is not None else None
    return "" if eta is None or job.state.terminal else f"ETA {duration(eta)}"


def wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Lines of ``width`` at most (a longer part is alone on its own), broken between parts."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(" · " + part) <= width:
            lines[-1] += " · " + part
        else:
            lines.append(part)
    return lines


def standing_of(job: JobDetail, rows_per_second: float | None = None) -> list[str]:
    """How far the work is, what is measured on the way, its speed and its memory."""
    progress = job.progress
    parts = []
    if job.kind == "infer" and job.rows_total:
        parts.append(f"{job.rows_done or 0}/{job.rows_total} rows")
        if job.row_errors:
            parts.append(f"{job.row_errors} with errors")
    elif progress is not None:
        parts.append(f"step {progress.step}/{progress.total_steps}")
        if progress.epoch:
            parts.append(f"epoch {progress.epoch:.2f}")
    if progress is not None:
        unit = "rows/s" if job.kind == "infer" else "examples/s"
        speed = progress.examples_per_second or rows_per_second
        for text, value in (
            ("loss {:.4f}", progress.loss),
            ("grad norm {:.3g}", progress.grad_norm),
            ("lr {:.2e}", progress.learning_rate),
            ("{:,.1f} " + unit, speed),
            ("{:,.0f} tokens/s", progress.tokens_per_second),
        ):
            if value is not None:
                parts.append(text.format(value))
        if progress.memory_bytes is not None:
            parts.append(f"memory {size(progress.memory_bytes)}")
    return parts


def attempts(console: Console, items: Sequence[AttemptView]) -> Table:
    columns = [
        Column("ATTEMPT", whole=True, right=True),
        Column("STATE", whole=True),
        Column("DEVICES", 60),
        Column("STARTED", 90),
        Column("TOOK", 70),
        Column("FAILURE", 50),
    ]
    rows = []
    for attempt in items:
        start, end = attempt.started_at, attempt.finished_at
        devices = ", ".join(dict.fromkeys(rank.device_id for rank in attempt.ranks))
        failure = attempt.failure if attempt.state is not AttemptState.CANCELLED else None
        took = duration((end - start).total_seconds()) if start and end else ""
        rows.append(
            (
                attempt.number, state(attempt.state), devices, clock(start) if start else "", took,
                f"{failure.failure_class}: {failure.message}" if failure else "",
            )
        )  # fmt: skip
    return table(console, columns, rows)


def event(item: EventView) -> Text:
    return Text.assemble((clock(item.at), "dim"), "  ", one_line(item.message))
