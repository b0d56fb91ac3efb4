"""The command ``usage``: what was used of devices, and rows and tokens, by API key, project or day."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gpuyard.cli import render
from gpuyard.cli.command import command
from gpuyard.cli.session import Session


def register(app: typer.Typer) -> None:
    command(app)(usage)


def usage(
    session: Session,
    *,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="A day (2026-11-24) or a time, in UTC.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="To before then; else to now.")
    ] = None,
    by: Annotated[
        Literal["key", "project", "day"] | None,
        typer.Option(help="key, project or day; else all in one."),
    ] = None,
) -> None:
    """Show device time, rows and tokens that were used, by API key, project or day."""
    found = session.client.usage(since=since, until=until, group=by)
    if session.json:
        session.emit(found)
        return
    session.out.print(render.usage(session.out, found))
