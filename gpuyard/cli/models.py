"""Commands for published models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpuyard.cli import render
from gpuyard.cli.command import ApiKey, Json, Url, command, guarded
from gpuyard.cli.session import Session, write
from gpuyard.cli.transfers import transfer_bar
from shared.views import ModelView

Reference = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="For instance topics@2.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="List published models; `models publish` adds one.")

    @group.callback(invoke_without_command=True)
    def models(
        ctx: typer.Context, json: Json = False, url: Url = None, api_key: ApiKey = None
    ) -> None:
        common = ctx.obj if isinstance(ctx.obj, Session) else Session()
        session = ctx.obj = common.with_options(json, url, api_key)
        if ctx.invoked_subcommand is None:
            guarded(session, lambda: list_models(session))

    command(group, "list")(list_models)
    command(group, "show")(show)
    command(group, "publish")(publish)
    command(group, "fetch")(fetch)
    command(group, "stage")(stage)
    command(group, "tag")(tag)
    command(group, "delete")(delete)
    app.add_typer(group, name="models")


def list_models(session: Session) -> None:
    """List published models, each in its newest version."""
    _print(session, list(session.client.models()), "no published models yet")


def show(session: Session, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Show the versions of a model, newest first; of NAME@VERSION that one."""
    if "@" in name:
        _print(session, [session.client.model(name)], "")
    else:
        _print(session, session.client.model_versions(name), "")


def publish(
    session: Session,
    job: Annotated[str, typer.Argument(metavar="JOB", help="A training job that succeeded.")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TEXT", help="May be given repeatedly.")
    ] = None,
) -> None:
    """Publish the model of a job as the next version of NAME; prints what specs call it."""
    _tell(session, session.client.publish(job, name, tags or ()))


def fetch(
    session: Session,
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@VERSION]",
            help="A version's number, latest (if left out), or a stage.",
        ),
    ],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="One that is not there yet.")],
) -> None:
    """Fetch the files of a model, checked by SHA-256, as a folder for from_pretrained."""
    with transfer_bar(session, model) as on_bytes:
        folder = session.client.fetch_model(model, to, on_bytes=on_bytes)
    if session.json:
        session.emit({"path": str(folder), "model": model})
    else:
        write(f"{folder}\n")


def stage(
    session: Session,
    model: Reference,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="staging, production, archived or none.")
    ],
) -> None:
    """Move a version to a stage. What was in production before is archived."""
    _tell(session, session.client.change_model(model, stage="" if stage == "none" else stage))


def tag(
    session: Session,
    model: Reference,
    tags: Annotated[list[str] | None, typer.Argument(metavar="TAG...")] = None,
) -> None:
    """Replace the tags of a version; without any, remove them."""
    _tell(session, session.client.change_model(model, tags=tags or ()))


def delete(session: Session, model: Reference) -> None:
    """Take a version off the list. Its files stay with its job."""
    _tell(session, session.client.delete_model(model))


def _print(session: Session, models: list[ModelView], nothing: str) -> None:
    if session.json:
        for model in models:
            session.emit(model)
    elif models:
        session.out.print(render.models(session.out, models))
    else:
        session.say(nothing)


def _tell(session: Session, model: ModelView) -> None:
    if session.json:
        session.emit(model)
        return
    write(model.reference + "\n")
    tags = f", tags {', '.join(model.tags)}" if model.tags else ""
    session.say(
        f"{model.task}, stage {model.stage or 'none'}{tags}, of {model.job_id}", style="dim"
    )
