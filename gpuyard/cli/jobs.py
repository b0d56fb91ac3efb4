"""Commands about jobs: jobs, show, watch, logs, cancel."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from rich.text import Text

from gpuyard.cli import render
from gpuyard.cli.command import command
from gpuyard.cli.session import Session, write
from gpuyard.cli.transfers import JobArgument
from gpuyard.cli.watch import watch as follow_to_its_end
from shared.errors import Conflict
from shared.lifecycle import JobState


def register(app: typer.Typer) -> None:
    command(app)(jobs)
    command(app)(show)
    command(app)(watch)
    command(app)(logs)
    command(app)(cancel)


def jobs(
    session: Session,
    *,
    state: Annotated[
        list[JobState] | None, typer.Option(help="Only in this state. Repeatable.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="train or infer.")] = None,
    name: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many; 0 is all.")] = 20,
) -> None:
    """List jobs, newest first."""
    found = session.client.jobs(state=state or None, kind=kind, name=name)
    items = itertools.islice(found, limit) if limit else found
    if session.json:
        for job in items:
            session.emit(job)
        return
    listed = list(items)
    if not listed:
        session.say("no jobs" + (" like that" if state or kind or name else " yet"))
        return
    session.out.print(render.jobs(session.out, listed))
    if limit and next(found, None) is not None:
        session.say(f"the newest {limit}; --limit 0 lists all", style="dim")


def show(session: Session, job: JobArgument) -> None:
    """Look at a job: state, reasons, progress, attempts and events."""
    detail = session.client.job(job)
    if session.json:
        session.emit(detail)
        return
    session.out.print(render.job_fields(detail))
    if detail.attempts:
        session.out.print()
        session.out.print(render.attempts(session.out, detail.attempts))
    events = list(session.client.events(job, follow=False))
    session.out.print()
    if len(events) > 20:
        session.out.print(Text(f"… {len(events) - 20} earlier events", style="dim"))
    for event in events[-20:]:
        session.out.print(render.event(event), soft_wrap=True)


def watch(session: Session, job: JobArgument) -> None:
    """Follow a job to its end; Ctrl-C detaches and the job goes on."""
    follow_to_its_end(session, job)


def logs(
    session: Session,
    job: JobArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only of this rank.")] = None,
) -> None:
    """Print what the ranks of a job printed."""
    pieces = session.client.logs(job, follow=follow, rank=rank)
    if session.json:
        for piece in pieces:
            session.emit(piece)
        return
    devices = session.client.job(job).spec["resources"]["devices"]
    printer = _LinePrinter(prefixed=devices != 1 and rank is None)
    for piece in pieces:
        printer.add(piece.attempt, piece.rank, piece.text)
    printer.end()


class _LinePrinter:
    """Pieces of text of several ranks as whole lines that say of whom they are."""

    def __init__(self, prefixed: bool) -> None:
        self._prefixed = prefixed
        self._open: dict[tuple[int, int], str] = {}
        self._attempt = 0

    def add(self, attempt: int, rank: int, text: str) -> None:
        if attempt > self._attempt:
            self.end()
            self._attempt = attempt
            if attempt > 1:
                write(f"--- attempt {attempt} ---\n")
        *lines, rest = (self._open.pop((attempt, rank), "") + text).split("\n")
        if rest:
            self._open[attempt, rank] = rest
        write("".join(self._line(rank, line) for line in lines))

    def end(self) -> None:
        """Print what never got its end of line."""
        for (_, rank), rest in self._open.items():
            write(self._line(rank, rest))
        self._open.clear()

    def _line(self, rank: int, line: str) -> str:
        return f"[rank {rank}] {line}\n" if self._prefixed else f"{line}\n"


def cancel(
    session: Session,
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="One or more.")],
    *,
    reason: Annotated[str, typer.Option(help="Kept with the job.")] = "by the user",
) -> None:
    """Cancel jobs. Those that run end within seconds."""
    over = []
    for id in jobs:
        job = session.client.cancel(id, reason)
        if session.json:
            session.emit(job)
        else:
            write(f"{id} {job.state}\n")
        if job.state in (JobState.SUCCEEDED, JobState.FAILED):
            over.append(f"{id} has {job.state} already")
    if over:
        raise Conflict("; ".join(over), hint="What is over cannot be cancelled.")
