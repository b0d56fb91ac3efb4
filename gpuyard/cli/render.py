"""Views as text and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.lifecycle import AttemptState, JobState
from shared.views import (
    ArtifactView,
    AttemptView,
    CheckpointView,
    DeviceView,
    EventView,
    FileView,
    JobDetail,
    JobView,
    ModelView,
    SweepDetail,
    SweepView,
    WorkerView,
)

STYLES = {
    "queued": "yellow",
    "dispatched": "cyan",
    "running": "cyan",
    "cancelling": "magenta",
    "succeeded": "green",
    "failed": "red",
    "lost": "red",
    "cancelled": "magenta",
    "up": "green",
    "draining": "yellow",
    "silent": "red",
    "suspect": "red",
    "gone": "dim",
}


_GAP = 2
_NARROWEST = 4
"""Of a column that is cut."""


@dataclass(frozen=True, slots=True)
class Column:
    """``from_width``: terminals narrower than that do without it. ``whole``: never cut."""

    title: str
    from_width: int = 0
    whole: bool = False
    right: bool = False


def table(console: Console, columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table:
    """A table that fits: columns leave before what identifies a row is cut."""
    shown = [i for i, column in enumerate(columns) if console.width >= column.from_width]
    result = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    cells = [[r[i] if isinstance(r[i], Text) else _one_line(r[i]) for i in shown] for r in rows]
    wanted = [
        max([cell_len(columns[i].title), *(cell_len(str(row[place])) for row in cells)])
        for place, i in enumerate(shown)
    ]
    room = console.width - _GAP * (len(shown) - 1)
    widths = fit(wanted, [columns[i].whole for i in shown], room)
    for i, width in zip(shown, widths, strict=True):
        column = columns[i]
        result.add_column(
            column.title,
            width=width,
            no_wrap=not column.whole,
            overflow="fold" if column.whole else "ellipsis",
            justify="right" if column.right else "left",
        )
    for row in cells:
        result.add_row(*row)
    return result


def fit(wanted: Sequence[int], whole: Sequence[bool], room: int) -> list[int]:
    """Widths of columns within ``room``: the widest of those that may be cut gives way first. Rich by
    itself takes from all alike, and leaves nothing of a narrow column beside a very wide one."""
    widths = list(wanted)
    while (excess := sum(widths) - room) > 0:
        cut = [i for i, keep in enumerate(whole) if not keep and widths[i] > _NARROWEST]
        if not cut:
            break  # Rich makes it fit
        widest = max(cut, key=lambda i: widths[i])
        rest = [widths[i] for i in cut if i != widest]
        widths[widest] = max(
            widths[widest] - excess, min(max(rest, default=0), widths[widest] - 1), _NARROWEST
        )
    return widths


def _one_line(value: Any) -> str:
    """Other people's text without what would move the cursor."""
    text = "" if value is None else str(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def state(value: str) -> Text:
    return Text(str(value), style=STYLES.get(str(value), ""))


def size(count: int) -> str:
    """Bytes for people, in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if amount.is_integer() else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """42 s, 3 m 05 s, 2 h 07 m, 3 d 04 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} m"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def age(then: datetime) -> str:
    return duration((datetime.now(then.tzinfo) - then).total_seconds())


def clock(then: datetime) -> str:
    return then.astimezone().strftime("%H:%M:%S")


def date(then: datetime | None) -> str:
    return then.astimezone().strftime("%Y-%m-%d %H:%M:%S") if then else ""


def number(value: Any) -> str:
    """Four significant digits for a float; whole numbers as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def fields(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Names and values one below the other; what is empty is left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, "", [], {}):
            grid.add_row(name, value if isinstance(value, Text) else _one_line(value))
    return grid


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
            ("task", f"{job.kind} {job.task}"),
            ("model", job.model),
            ("needs", needs(job.requirements)),
            ("priority", job.priority or None),
            ("progress", pace(job) if progress else None),
            ("submitted", date(job.created_at)),
            ("started", date(job.started_at)),
            ("finished", date(job.finished_at)),
            ("took", took),
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
    most = max(requirements.get("world_sizes") or (least,))
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


def summary(job: JobView) -> str:
    """The numbers a job ended with."""
    came_to = job.summary or {}
    parts = [
        f"{name.replace('_', ' ')} {number(value)}"
        for name, value in came_to.items()
        if isinstance(value, int | float | str)
        and not isinstance(value, bool)
        and name not in ("done", "peak_memory_bytes")  # of a batch job that ended well: all rows
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
    return Text.assemble((clock(item.at), "dim"), "  ", _one_line(item.message))


def sweeps(console: Console, items: Sequence[SweepView]) -> Table:
    columns = [
        Column("SWEEP", whole=True),
        Column("TRIALS", whole=True),
        Column("BEST", 80),
        Column("AGE", 70),
        Column("NAME", 60),
    ]
    rows = [(s.id, standing(s), best(s), age(s.created_at), s.name or "") for s in items]
    return table(console, columns, rows)


def standing(sweep: SweepView) -> str:
    """``3 succeeded, 1 running``."""
    return ", ".join(f"{count} {name}" for name, count in sorted(sweep.states.items()))


def best(sweep: SweepView) -> str:
    """``trial 2: accuracy 0.9125``; empty before one has succeeded."""
    if sweep.best is None:
        return ""
    return f"trial {sweep.best.number}: {sweep.metric} {sweep.best.value:.4g}"


def trials(console: Console, sweep: SweepDetail) -> Table:
    """One line a trial: what differs, how it stands, what it came to."""
    fields = list(dict.fromkeys(field for trial in sweep.trials for field in trial.parameters))
    columns = [
        Column("TRIAL", whole=True, right=True),
        *(Column(field.rpartition(".")[2].upper(), whole=True) for field in fields),
        Column("STATE", whole=True),
        Column((sweep.metric or "metric").upper(), whole=True, right=True),
        Column("JOB", 90),
    ]
    rows = []
    for trial in sweep.trials:
        chosen = sweep.best is not None and trial.number == sweep.best.number
        value = "" if trial.value is None else f"{trial.value:.4g}"
        rows.append(
            (
                trial.number,
                *(_setting(trial.parameters.get(field)) for field in fields),
                state(trial.state),
                Text(f"{value} best", style="green") if chosen else value,
                trial.job_id,
            )
        )
    return table(console, columns, rows)


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def fleet(console: Console, devices: Sequence[DeviceView], workers: Sequence[WorkerView]) -> Table:
    """Devices with what serves them and what they run."""
    serving = {worker.device_id: worker for worker in workers}
    columns = [
        Column("DEVICE", whole=True),
        Column("STATE", whole=True),
        Column("RUNS", whole=True),
        Column("MODEL", 100),
        Column("CLASS (QUEUE)", 80),
        Column("MEMORY", 90, right=True),
        Column("WARM", 150),
        Column("WORKER", 120),
    ]
    rows = []
    for device in devices:
        worker = serving.get(device.id)
        model = f"{device.model} (simulated)" if device.simulated else device.model
        name = Text(device.id)
        if device.simulated:
            name.append(" sim" if console.width >= 100 else " (simulated)", style="yellow")
        shown = state(device.state)
        if device.state == "silent":
            shown.append(f" {duration(device.seconds_silent)}")
        runs = f"{device.job_id}" + (f" rank {device.rank}" if device.rank else "")
        rows.append(
            (
                name, shown, runs if device.job_id else "-", model, device.queue,
                size(device.memory_bytes), ", ".join(device.warm),
                f"pid {worker.pid}, {worker.version}" if worker else "",
            )
        )  # fmt: skip
    return table(console, columns, rows)


def suspicion(device: DeviceView) -> str:
    """Why a device that is up gets no work."""
    said = f"{device.id} gets no work, it seems deaf: {device.suspect_reason}."
    if device.suspect_until is not None:
        said += f" From {clock(device.suspect_until)} on it is tried with one job."
    return f"{said} See whether its host reaches the broker; a restart of its worker clears it."
