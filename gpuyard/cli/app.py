"""The command line put together."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from gpuyard.cli import fleet, jobs, models, rows, serve, submit, sweeps, transfers, usage
from gpuyard.cli.command import EXIT_CODES, ApiKey, Exit, Json, Url
from gpuyard.cli.session import Session


def build() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        name="gpuyard",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        epilog=EXIT_CODES,
    )
    app.callback(epilog=EXIT_CODES)(_common)
    submit.register(app)
    jobs.register(app)
    rows.register(app)
    sweeps.register(app)
    transfers.register(app)
    models.register(app)
    usage.register(app)
    fleet.register(app)
    serve.register(app)
    return app


def _common(
    ctx: typer.Context, json: Json = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Your GPUs as your own fine-tuning and batch-inference service.

    Without --url and GPUYARD_URL, the service is the local stack that `gpuyard up` runs.
    """
    ctx.obj = Session(json=json, url=url, api_key=api_key)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        build()(args=list(argv) if argv is not None else None, prog_name="gpuyard")
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else Exit.USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Exit.INTERRUPTED
    return Exit.OK
