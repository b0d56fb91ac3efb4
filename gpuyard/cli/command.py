"""Declaring a command: it gets the common options, and its errors become lines and exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Any, get_type_hints

import typer

from gpuyard.cli.session import Session
from shared.errors import GpuyardError

DEBUG = "GPUYARD_DEBUG"


class Exit(IntEnum):
    """What scripts can trust; the others are ``exit_code`` of ``shared.errors``."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    AUTHENTICATION = 4
    CONFLICT = 5
    UNAVAILABLE = 6
    INTERRUPTED = 130
    BROKEN_PIPE = 141


EXIT_CODES = (
    "Exit codes: 0 done · 1 the job failed or was cancelled · 2 the request or the command line is "
    "wrong · 3 there is no such thing · 4 the API key is missing or wrong · 5 the state does not "
    "allow it · 6 the service cannot be reached right now · 130 interrupted (a job that is waited "
    "for goes on)"
)

Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object, or one a line, on stdout.", show_default=False),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The service; else GPUYARD_URL, else the local stack."
    ),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", metavar="KEY", help="Else GPUYARD_API_KEY.")
]
_COMMON = (("json", Json, False), ("url", Url, None), ("api_key", ApiKey, None))


class Interrupted(Exception):
    """Ctrl-C, with what is to be said about it."""


def command(
    app: typer.Typer, name: str | None = None, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register ``function(session, …)`` under ``app``, with ``--json``, ``--url`` and ``--api-key``."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [p.replace(annotation=hints[p.name]) for p in own] + [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for n, kind, default in _COMMON
        ]
        first = inspect.Parameter(
            "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )

        @functools.wraps(function)
        def run(
            ctx: typer.Context, *, json: bool, url: str | None, api_key: str | None, **own: Any
        ) -> None:
            common = ctx.obj if isinstance(ctx.obj, Session) else Session()
            session = ctx.obj = common.with_options(json, url, api_key)
            guarded(session, lambda: function(session, **own))

        # typer reads the signature, so it has to be that of the wrapper and not of what it wraps.
        del run.__wrapped__
        run.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [first, *parameters]}
        app.command(name, **settings)(run)
        return function

    return register


def guarded(session: Session, work: Callable[[], None]) -> None:
    """Run a command's work; whatever it raises becomes a message and an exit code."""
    try:
        work()
        sys.stdout.flush()
    except GpuyardError as error:
        session.complain(error)
        raise typer.Exit(error.exit_code) from None
    except (KeyboardInterrupt, Interrupted) as interrupt:
        session.say(str(interrupt) or "interrupted")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        # The reader went away (`| head`), which is its right. What is still buffered must not
        # raise again when the interpreter flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(Exit.BROKEN_PIPE) from None
    except typer.Exit:
        raise
    except Exception as error:
        # Last of all: whatever a command did not foresee is a defect, and users get no traceback.
        if os.environ.get(DEBUG):
            traceback.print_exc()
        session.complain(
            GpuyardError(
                f"this is a defect of gpuyard: {type(error).__name__}: {error}",
                code="defect",
                hint=f"Please report it, with what {DEBUG}=1 prints.",
            )
        )
        raise typer.Exit(Exit.FAILED) from None
