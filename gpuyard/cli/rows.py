"""Commands about the rows of batch jobs, and running them again: results, retry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuyard.cli import specs
from gpuyard.cli.command import Interrupted, command
from gpuyard.cli.session import Session, write
from gpuyard.cli.submitted import IdempotencyKey, Wait, tell
from gpuyard.cli.transfers import JobArgument
from gpuyard.errors import JobFailed
from gpuyard.streams import Order
from shared.lifecycle import JobState


def register(app: typer.Typer) -> None:
    command(app)(results)
    command(app)(retry)


def results(
    session: Session,
    job: JobArgument,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Instead of stdout; appears whole. Parquet where it ends in .parquet, else JSONL.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for rows until the job is over.")
    ] = False,
    order: Annotated[
        Order, typer.Option(help="input, or completion: rows as they come.")
    ] = "input",
) -> None:
    """Print the rows of a batch job as JSONL, also while it runs, or write them into a file."""
    count = 0
    try:
        if output:
            count = session.client.download_results(job, output, follow=follow, order=order)
        else:
            for row in session.client.results(job, follow=follow, order=order):
                write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
                count += 1
    except KeyboardInterrupt:
        done = "" if output else f" after {count} rows"
        raise Interrupted(f"interrupted{done}; {job} goes on") from None
    detail = session.client.job(job)
    missing = (detail.rows_total or 0) - count
    if not detail.state.terminal and missing > 0:
        session.say(f"{count} of {detail.rows_total} rows so far; --follow waits for the rest")
    elif output:
        session.say(f"{count} rows in {output}")
    if follow and detail.state is not JobState.SUCCEEDED:
        raise JobFailed(detail)


def retry(
    session: Session,
    job: JobArgument,
    *,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only the rows that failed, with their numbers.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Another value for a field of the spec; null takes it away. Repeatable.",
        ),
    ] = None,
    wait: Wait = False,
    idempotency_key: IdempotencyKey = None,
) -> None:
    """Submit a job that is over once more, and print the id of the new one.

    gpuyard retry job_01JD2V… --failed --set too_long=truncate --wait
    """
    changes: dict[str, Any] = {}
    for setting in settings or ():
        specs.put(changes, *specs.parse_setting(setting))
    again = session.client.retry(
        job, failed=failed, changes=changes, idempotency_key=idempotency_key
    )
    rows = f"{again.rows_total} rows, " if failed else ""
    tell(session, again, wait=wait, about=rows)
