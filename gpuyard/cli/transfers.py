"""Commands that move files, and the bar that shows them moving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gpuyard.cli import render
from gpuyard.cli.command import ApiKey, Json, Url, command, guarded
from gpuyard.cli.session import Session, write
from gpuyard.transfer import OnBytes

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="For instance job_01JD2V….")]


def register(app: typer.Typer) -> None:
    command(app)(checkpoints)
    command(app)(artifacts)
    command(app)(download)
    group = typer.Typer(help="List uploaded files; `files upload` adds some.")

    @group.callback(invoke_without_command=True)
    def files(
        ctx: typer.Context, json: Json = False, url: Url = None, api_key: ApiKey = None
    ) -> None:
        common = ctx.obj if isinstance(ctx.obj, Session) else Session()
        session = ctx.obj = common.with_options(json, url, api_key)
        if ctx.invoked_subcommand is None:
            guarded(session, lambda: list_files(session))

    command(group, "list")(list_files)
    command(group, "upload")(upload)
    app.add_typer(group, name="files")


@contextmanager
def transfer_bar(session: Session, what: str) -> Iterator[OnBytes | None]:
    """A callback that draws a bar on a terminal; None where nobody would see it."""
    if not session.live:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=session.err, transient=True) as progress:
        task = progress.add_task(what, visible=False)

        def moved(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield moved


def list_files(session: Session) -> None:
    """List uploaded files, newest first."""
    files = session.client.files()
    if session.json:
        for file in files:
            session.emit(file)
        return
    listed = list(files)
    if listed:
        session.out.print(render.files(session.out, listed))
    else:
        session.say("no files yet")


def upload(
    session: Session,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="One or more.")],
) -> None:
    """Upload files; prints their ids, which specs can name."""
    for path in paths:
        with transfer_bar(session, path.name) as on_bytes:
            file = session.client.upload(path, on_bytes)
        if session.json:
            session.emit(file)
        else:
            write(file.id + "\n")
            session.say(f"{file.name}, {render.size(file.size)}", style="dim")


def checkpoints(session: Session, job: JobArgument) -> None:
    """List the checkpoints of a training job, newest first; the best model is marked."""
    found = session.client.checkpoints(job)
    if session.json:
        for checkpoint in found:
            session.emit(checkpoint)
    elif found:
        session.out.print(render.checkpoints(session.out, found))
    else:
        session.say("no checkpoints yet")


def artifacts(session: Session, job: JobArgument) -> None:
    """List the deliverables of a job that succeeded."""
    found = session.client.artifacts(job)
    if session.json:
        for artifact in found:
            session.emit(artifact)
    elif found:
        session.out.print(render.artifacts(session.out, found))
    else:
        session.say("no artifacts; a job has them once it has succeeded")


def download(
    session: Session,
    job: JobArgument,
    name: Annotated[str | None, typer.Argument(help="One of its artifacts; else all.")] = None,
    *,
    to: Annotated[
        Path,
        typer.Option("--to", "-o", metavar="PATH", help="A folder; for one artifact, the file."),
    ] = Path(),
) -> None:
    """Download deliverables, checked by SHA-256; a broken download is resumed."""
    with transfer_bar(session, name or "downloading") as on_bytes:
        paths = session.client.download(job, name, to, on_bytes=on_bytes)
    for path in paths:
        if session.json:
            session.emit({"path": str(path.resolve()), "size": path.stat().st_size})
        else:
            write(f"{path}\n")
