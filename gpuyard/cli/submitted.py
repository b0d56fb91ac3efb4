"""What the commands that submit a job have in common: their options, and how they end."""

from __future__ import annotations

from typing import Annotated

import typer

from gpuyard.cli.session import Session, write
from gpuyard.cli.watch import watch
from shared.views import JobDetail

Wait = Annotated[
    bool, typer.Option("--wait", "-w", help="Follow it to its end; exit 1 unless it succeeds.")
]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="A repeat with it gives the first job.")
]


def tell(session: Session, job: JobDetail, *, wait: bool, about: str = "") -> None:
    """Print the id of a job that was submitted, or follow it to its end."""
    if wait:
        session.say(job.id, "bold")
        watch(session, job.id)
    elif session.json:
        session.emit(job)
    else:
        write(job.id + "\n")
        session.say(f"{about}{job.state}; follow it with: gpuyard watch {job.id}", "dim")
