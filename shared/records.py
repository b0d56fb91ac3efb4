"""Training files, read row by row: each row an object with its place in the file. Pure of any task."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.rows import MAX_LINE_BYTES


class BadRow(Exception):
    """A row that cannot be used. ``code`` is stable; ``line`` counts from 1, 0 where it is unknown."""

    def __init__(self, code: str, message: str, *, line: int = 0, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.line = line
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Record:
    """One row. ``size`` is what it took of the file, in bytes."""

    line: int
    fields: dict[str, Any]
    size: int


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a JSONL file, one line in memory at a time; blank lines are skipped and counted.

    Raises:
        BadRow: invalid_json or line_too_long, with its line.
        OSError: the file cannot be read.
    """
    line = 0
    with path.open("rb") as file:
        while content := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if len(content) > MAX_LINE_BYTES:
                raise BadRow(
                    "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", line=line
                )
            if content.strip():
                yield Record(line, _parse(content, line), len(content))


def _parse(content: bytes, line: int) -> dict[str, Any]:
    try:
        fields = json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            "invalid_json",
            f"not UTF-8 (byte {error.start})",
            line=line,
            hint="Save the file as UTF-8.",
        ) from None
    except json.JSONDecodeError as error:
        raise BadRow(
            "invalid_json",
            f"no JSON: {error.msg} at column {error.colno}",
            line=line,
            hint="The file must be JSONL: one JSON object a line.",
        ) from None
    except (ValueError, RecursionError):
        raise BadRow("invalid_json", "no JSON that can be read", line=line) from None
    if not isinstance(fields, dict):
        raise BadRow("invalid_json", f"no JSON object but {kind_of(fields)}", line=line)
    return fields


def kind_of(value: Any) -> str:
    """What a JSON value is, in words for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
