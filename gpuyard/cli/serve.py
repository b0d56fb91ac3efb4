"""Commands that run the service: the local stack, the demo, and each part as a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuyard.cli import render
from gpuyard.cli.command import command, guarded
from gpuyard.cli.session import Session
from gpuyard.connection import default_data_folder
from shared.errors import ConfigurationError

if TYPE_CHECKING:
    from gpuyard.local.instance import Instance


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the service that runs as a process of its own."""

    module: list[str]
    """What ``python -m`` runs, with its first arguments."""
    extra: str
    """What brings it, and ``needs``: packages that show that it is there."""
    needs: tuple[str, ...]
    help: str


PARTS = {
    "worker": Part(["workers"], "worker", ("celery", "torch"), "Serve the devices of this host."),
    "migrate": Part(
        ["scheduler", "migrate"],
        "scheduler",
        ("fastapi", "alembic"),
        "Bring the database up to date.",
    ),
    "api": Part(["scheduler", "api"], "scheduler", ("fastapi", "uvicorn"), "Serve the API."),
    "scheduler": Part(
        ["scheduler", "run"], "scheduler", ("fastapi", "celery"), "Schedule; one of several leads."
    ),
    "keys": Part(
        ["scheduler", "keys"], "scheduler", ("fastapi", "sqlmodel"), "Make and revoke API keys."
    ),
    "flower": Part(["gpuyard.local.flower"], "monitor", ("flower",), "Serve the monitor, Flower."),
}


def register(app: typer.Typer) -> None:
    panel = "Run the service"
    command(app, rich_help_panel=panel)(up)
    command(app, rich_help_panel=panel)(demo)
    for name, part in PARTS.items():
        app.command(
            name,
            help=part.help,
            rich_help_panel=panel,
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_become(name))


def _become(name: str) -> Callable[[typer.Context], None]:
    def run(ctx: typer.Context) -> None:
        session = ctx.obj if isinstance(ctx.obj, Session) else Session()
        guarded(session, lambda: become(name, ctx.args))

    return run


def become(name: str, arguments: list[str]) -> None:
    """Replace this process by a part of the service, which is never imported here.

    Raises:
        ConfigurationError: the extra that brings it is not installed.
    """
    part = PARTS[name]
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise _not_installed(f"gpuyard {name}", part.extra, ", ".join(missing))
    argv = [sys.executable, "-m", *part.module, *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, argv)  # noqa: S606 - to be that process, with its signals and exit code


def up(
    session: Session,
    *,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="This many CPU slots. Default: the GPUs, else CPU slots."
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="As of `gpuyard worker`: auto, gpu:all, cpu:2, …")
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Devices to register and not to have: 2xA100-80GB,1xT4-16GB."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Default: GPUYARD_DATA, or ~/.local/share/gpuyard."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where API and Flower listen.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Of the API; 0 is any. Default: 8080 if it is free."),
    ] = None,
    flower_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: 5555 if it is free.")
    ] = None,
    flower: Annotated[bool, typer.Option(help="Also run Flower.")] = True,
) -> None:
    """Run the whole service on this machine until Ctrl-C.

    Postgres, Valkey, API, scheduler, workers and Flower; their data stay in one folder, and the next
    start goes on with them. DATABASE_URL and BROKER_URL name servers to use in place of its own.
    """
    if sum(option is not None for option in (workers, devices, simulate)) > 1:
        raise ConfigurationError(
            "--workers, --devices and --simulate exclude each other: give one", param="--workers"
        )
    stack = _local("stack")
    chosen = {"data": data} if data is not None else {}
    options = stack.StackOptions(
        devices=devices or (f"cpu:{workers}" if workers else "auto"),
        simulate=simulate,
        host=host,
        api_port=port,
        flower_port=flower_port,
        flower=flower,
        **chosen,
    )
    stack.up(options, lambda line: session.say(line, "dim"), lambda found: _where(session, found))


def _where(session: Session, instance: Instance) -> None:
    """Where everything of the stack is, once it answers."""
    if session.json:
        session.emit(
            {
                "url": instance.url,
                "api_key_file": instance.api_key_file,
                "flower_url": instance.flower_url,
                "data": instance.data,
                "pid": instance.pid,
            }
        )
        return
    flower = instance.flower_url and (
        f"{instance.flower_url}  (user {instance.flower_user}, password in "
        f"{instance.flower_password_file})"
    )
    session.out.print(
        render.fields(
            [
                ("API", f"{instance.url}/docs"),
                ("API key", f"in {instance.api_key_file}"),
                ("Flower", flower),
                ("data", instance.data),
                ("logs", f"{instance.data}/logs"),
            ]
        )
    )
    if instance.data != str(default_data_folder()):
        session.say(f"In another terminal first: export GPUYARD_DATA={shlex.quote(instance.data)}")
    session.say("In another terminal: gpuyard submit … · gpuyard jobs · gpuyard workers")
    session.say("Ctrl-C stops all of it.")


def demo(
    session: Session,
    *,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A stack that runs on it already is used.")
    ] = None,
) -> None:
    """Fine-tune, classify and generate: the main job end to end, on real models and text."""
    _local("demo").run(data=data, console=session.out)


def _local(module: str) -> Any:
    """A module of the local stack; imported only here, since it needs the extra ``local``.

    Raises:
        ConfigurationError: the extra is not installed.
    """
    try:
        return importlib.import_module(f"gpuyard.local.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gpuyard"):
            raise
        raise _not_installed("The local stack", "local", error.name or "?") from None


def _not_installed(what: str, extra: str, missing: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} needs packages that are not installed: {missing}",
        code="extra_missing",
        hint=f"pip install 'gpuyard[{extra}]'",
    )
