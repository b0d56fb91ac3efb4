"""Commands about sweeps: ``sweep`` submits one, ``sweeps`` lists and shows them."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from gpuyard.cli import render, specs
from gpuyard.cli.command import Interrupted, command
from gpuyard.cli.session import Session, write
from gpuyard.cli.transfers import transfer_bar
from gpuyard.waiting import looks
from shared.errors import GpuyardError, Unavailable
from shared.views import SweepDetail

LOOK_EVERY = 1.0


def register(app: typer.Typer) -> None:
    command(app)(sweep)
    command(app)(sweeps)


def sweep(
    session: Session,
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP", help="YAML or JSON: spec, parameters, strategy; - is stdin."
        ),
    ],
    *,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Follow it to its end; exit 1 unless one succeeds.")
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="A repeat with it gives the first sweep.")
    ] = None,
    upload: Annotated[
        bool, typer.Option(help="Upload the files that exist here, unless the service has them.")
    ] = True,
) -> None:
    """Submit a sweep, many trials of one training, and print its id.

    gpuyard sweep examples/sweep.yaml --wait
    """
    wanted = specs.read_spec(spec)
    bases = [Path(spec).parent] if spec != "-" else []
    with ExitStack() as stack:
        on_bytes = stack.enter_context(transfer_bar(session, "uploading")) if upload else None
        made = session.client.submit_sweep(
            wanted, idempotency_key=idempotency_key, upload=upload, bases=bases, on_bytes=on_bytes
        )
    if wait:
        session.say(f"{made.id}: {len(made.trials)} trials", "bold")
        _follow(session, made.id)
    elif session.json:
        session.emit(made)
    else:
        write(made.id + "\n")
        session.say(f"{len(made.trials)} trials; see: gpuyard sweeps {made.id}", "dim")


def sweeps(
    session: Session,
    id: Annotated[
        str | None, typer.Argument(metavar="SWEEP", help="Show the trials of one.")
    ] = None,
    *,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel its trials.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="How many; 0 is all.")] = 20,
) -> None:
    """List sweeps, newest first; with an id, show its trials and the best of them."""
    if id is not None:
        client = session.client
        _show(session, client.cancel_sweep(id) if cancel else client.sweep(id))
        return
    if cancel:
        raise GpuyardError("--cancel needs the sweep's id", hint="`gpuyard sweeps` lists them.")
    found = session.client.sweeps()
    items = list(itertools.islice(found, limit) if limit else found)
    if session.json:
        for item in items:
            session.emit(item)
    elif items:
        session.out.print(render.sweeps(session.out, items))
    else:
        session.say("no sweeps yet")


def _follow(session: Session, id: str) -> None:
    last: SweepDetail | None = None
    try:
        for look in looks(lambda: session.client.sweep(id), every=LOOK_EVERY):
            if isinstance(look, Unavailable):
                continue  # the session says so; the trials go on
            session.reached()
            if last is None or look.states != last.states:
                session.say(render.standing(look))
            last = look
    except KeyboardInterrupt:
        raise Interrupted(
            f"detached; the trials go on\n  see them:    gpuyard sweeps {id}\n"
            f"  cancel them: gpuyard sweeps {id} --cancel"
        ) from None
    assert last is not None  # noqa: S101 - the last look was the end
    _show(session, last)
    if not last.states.get("succeeded"):
        raise GpuyardError(
            "no trial succeeded", hint=f"See `gpuyard show {last.trials[0].job_id}`."
        )


def _show(session: Session, sweep: SweepDetail) -> None:
    if session.json:
        session.emit(sweep)
        return
    session.out.print(render.trials(session.out, sweep))
    if best := render.best(sweep):
        found = sweep.best.job_id if sweep.best else ""
        session.say(f"best: {best}, model job:{found}", style="green")
