"""Commands about the service itself: workers, health, version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import typer

from gpuyard.cli import render
from gpuyard.cli.command import command
from gpuyard.cli.session import Session, write
from shared.errors import Unavailable


def register(app: typer.Typer) -> None:
    command(app)(workers)
    command(app)(health)
    command(app)(version)


def workers(session: Session) -> None:
    """List devices and workers: class, memory, state, and what each runs."""
    devices, serving = session.client.devices(), session.client.workers()
    if session.json:
        session.emit(
            {
                "devices": [device.model_dump(mode="json") for device in devices],
                "workers": [worker.model_dump(mode="json") for worker in serving],
            }
        )
    elif devices:
        session.out.print(render.fleet(session.out, devices, serving))
        for device in devices:
            if device.state == "suspect":
                session.say(render.suspicion(device))
    else:
        session.say("no devices yet; `gpuyard worker` on a host registers those it has")


def health(session: Session) -> None:
    """Say whether the service is ready; exit 6 if it cannot serve."""
    found = session.client.health()
    if session.json:
        session.emit(found)
    else:
        pairs = [("service", session.client.connection.url), ("status", found.status)]
        session.out.print(
            render.fields([*pairs, *found.checks.items(), ("version", found.version)])
        )
    if found.status == "unavailable":
        raise Unavailable("the service cannot serve right now", hint="See the checks above.")


def version(session: Session) -> None:
    """Print the version of this client."""
    try:
        number = installed_version("gpuyard")
    except PackageNotFoundError:
        number = "0+unknown"
    if session.json:
        session.emit({"version": number})
    else:
        write(f"gpuyard {number}\n")
