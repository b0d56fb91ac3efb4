"""Reads server-sent events as a client does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Sent:
    event: str
    id: str | None
    data: Any


def events(answer: httpx.Response) -> Iterator[Sent]:
    """Whole events, as they arrive; comments are skipped."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Sent(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}
