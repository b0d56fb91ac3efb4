"""What every command shares: the options it was called with, the client, and where output goes.

Data goes to stdout and everything else to stderr, so that output can be piped and progress still be
seen. Nothing is ever parsed as Rich markup: names and messages are other people's text.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

from pydantic import BaseModel
from rich.console import Console

from gpuyard.client import Client
from shared.errors import GpuyardError, Unavailable

PIPE_WIDTH = 200
"""Columns of output that goes to no terminal: wide, since nothing there needs to be cut."""

PATIENCE = 10.0
"""Seconds that somebody at a terminal waits for a service that does not answer."""


@dataclass
class Session:
    """One call of the command line."""

    json: bool = False
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    _trouble: str = field(default="", init=False)

    def with_options(self, json: bool, url: str | None, api_key: str | None) -> Session:
        """With the options that also stood after the command's name, which go first."""
        return Session(json or self.json, url or self.url, api_key or self.api_key)

    @cached_property
    def client(self) -> Client:
        return Client(self.url, self.api_key, patience=PATIENCE, on_retry=self._on_retry)

    def _on_retry(self, error: Unavailable) -> None:
        if not self._trouble:
            self.say(f"{error.message}; trying again", "yellow")
        self._trouble = error.message

    def reached(self) -> None:
        """Say that trouble is over, if trouble was said."""
        if self._trouble:
            self.say("the service is back", "yellow")
        self._trouble = ""

    @cached_property
    def out(self) -> Console:
        return _console(sys.stdout)

    @cached_property
    def err(self) -> Console:
        return _console(sys.stderr)

    @property
    def live(self) -> bool:
        """Whether somebody watches stderr, so that moving progress makes sense."""
        return self.err.is_terminal and not self.json

    def emit(self, value: BaseModel | dict[str, Any]) -> None:
        """One JSON object as one line of stdout."""
        text = (
            value.model_dump_json()
            if isinstance(value, BaseModel)
            else json.dumps(value, ensure_ascii=False, default=str)
        )
        write(text + "\n")

    def say(self, line: str, style: str | None = None) -> None:
        """A remark for people, on stderr; nothing with ``--json``."""
        if not self.json:
            self.err.print(line, style=style, soft_wrap=True)

    def complain(self, error: GpuyardError) -> None:
        """One block on stderr: what is wrong, where, and what to do."""
        if self.json:
            body = {
                "code": error.code,
                "message": error.message,
                "param": error.param,
                "hint": error.hint,
                "request_id": error.request_id,
            }
            print(json.dumps({"error": body}), file=sys.stderr, flush=True)
            return
        kind = getattr(error, "failure_class", None)
        code = f"{kind}: {error.code}" if kind and kind != error.code else error.code
        self.err.print(f"error: {error.message} [{code}]", style="bold red", soft_wrap=True)
        for label, value in (
            ("where", error.param),
            ("hint", error.hint),
            ("request", error.request_id),
        ):
            if value:
                text = value.replace("\n", "\n" + " " * 10)
                self.err.print(f"{label + ':':>9} {text}", soft_wrap=True)


def write(text: str) -> None:
    """Raw text to stdout, out at once: who follows a job through a pipe sees it now."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _console(file: TextIO) -> Console:
    width = None
    if not file.isatty():
        width = int(os.environ.get("COLUMNS") or PIPE_WIDTH)
    return Console(
        file=file, markup=False, emoji=False, highlight=False, width=width, force_jupyter=False
    )
