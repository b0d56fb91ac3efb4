"""Rows of files, each an object with its place in the file: JSONL and plain text.

``shared/formats.py`` chooses the reader of a file; no reader knows of any task.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.rows import MAX_LINE_BYTES


class BadRow(Exception):
    """A row that cannot be used. ``code`` is stable; ``line`` counts from 1 (rows, in Parquet), 0 where
    it is unknown."""

    def __init__(self, code: str, message: str, *, line: int = 0, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.line = line
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Record:
    """One row. ``line`` is where it begins; ``size`` is what it took of the file, in bytes."""

    line: int
    fields: dict[str, Any]
    size: int


def insist(rows: Iterable[Record | BadRow]) -> Iterator[Record]:
    """``rows`` as long as they can be used.

    Raises:
        BadRow: the first that cannot.
    """
    for row in rows:
        if isinstance(row, BadRow):
            raise row
        yield row


def scan_jsonl(path: Path) -> Iterator[Record | BadRow]:
    """One object a line; invalid_json or line_too_long where it is none.

    Raises:
        OSError: the file cannot be read.
    """
    for line, content in read_lines(path, cut=True):
        if not content.strip():
            continue
        try:
            yield Record(line, _parse(_whole(content, line), line), len(content))
        except BadRow as problem:
            yield problem


def scan_text(path: Path) -> Iterator[Record | BadRow]:
    """Each line is a row ``{"text": line}``, without its end; invalid_text or line_too_long where it is
    none.

    Raises:
        OSError: the file cannot be read.
    """
    for line, content in read_lines(path, cut=True):
        try:
            text = decode(_whole(content, line), line, code="invalid_text").rstrip("\r\n")
        except BadRow as problem:
            yield problem
            continue
        if text.strip():
            yield Record(line, {"text": text}, len(content))


def read_lines(path: Path, *, cut: bool = False) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content with its end) of every line; one is in memory at a time.

    Args:
        cut: A line that is too long comes without its rest, still one byte too long, and the lines
            behind it follow.

    Raises:
        BadRow: line_too_long.
        OSError: the file cannot be read.
    """
    line = 0
    with path.open("rb") as file:
        while content := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if not cut:
                _whole(content, line)
            yield line, content
            rest = content if len(content) > MAX_LINE_BYTES else b""
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)


def _whole(content: bytes, line: int) -> bytes:
    if len(content) > MAX_LINE_BYTES:
        raise BadRow("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes", line=line)
    return content


def decode(content: bytes, line: int, *, code: str) -> str:
    """A line of UTF-8; the first may begin with a byte order mark.

    Raises:
        BadRow: ``code``.
    """
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            code, f"not UTF-8 (byte {error.start})", line=line, hint="Save the file as UTF-8."
        ) from None


def _parse(content: bytes, line: int) -> dict[str, Any]:
    text = decode(content, line, code="invalid_json")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(
            "invalid_json",
            f"no JSON: {error.msg} at column {error.colno}",
            line=line,
            hint="JSONL has one JSON object a line; for another kind of file set data.format.",
        ) from None
    except (ValueError, RecursionError):
        raise BadRow("invalid_json", "no JSON that can be read", line=line) from None
    if not isinstance(fields, dict):
        raise BadRow("invalid_json", f"no JSON object but {kind_of(fields)}", line=line)
    return fields


def kind_of(value: Any) -> str:
    """What a value is, in words for people. JSON has the first five; Parquet has more."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    numbers = {int: "a number", float: "a number"}
    return (names | numbers).get(type(value)) or f"a value of type {type(value).__name__}"
