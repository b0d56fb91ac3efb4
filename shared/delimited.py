"""CSV and TSV as RFC 4180 has them, with a header line: every field is a string."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.records import BadRow, Record, decode, read_lines
from shared.rows import MAX_LINE_BYTES

# The module's own limit is 128 KiB, for the whole process; a row is bounded below in any case.
csv.field_size_limit(MAX_LINE_BYTES)
_UNCLOSED = "unexpected end of data"
"""What ``csv`` says of a quote that is open where the file ends."""


def scan_delimited(path: Path, delimiter: str) -> Iterator[Record | BadRow]:
    """The rows below the header. A field in double quotes may hold delimiters, newlines, and quotes
    that are doubled. Blank lines are no rows; a column without a name is left out.

    A row that cannot be used is invalid_csv, with the line that it begins on; the next one begins on
    the line behind it.

    Raises:
        BadRow: invalid_csv or line_too_long: the header is none, or a quote is never closed.
        OSError: the file cannot be read.
    """
    lines = _Lines(path)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            place = lines.next_row()
            problem = place.problem or _no_csv(error, place.line)
            if names is None or _UNCLOSED in str(error):
                raise problem from None
            yield problem
            continue
        if row is None:
            return
        place = lines.next_row()
        if place.problem is not None:
            if names is None:
                raise place.problem
            yield place.problem
        elif not row or (len(row) == 1 and not row[0].strip()):
            continue
        elif names is None:
            names = _header(row, place.line)
        elif len(row) != len(names):
            yield BadRow(
                "invalid_csv",
                f"{len(row)} field(s), and the header names {len(names)}",
                line=place.line,
                hint="A field that holds the delimiter or a newline stands in double quotes.",
            )
        else:
            fields = {name: field for name, field in zip(names, row, strict=True) if name}
            yield Record(place.line, fields, place.size)


def _no_csv(error: csv.Error, line: int) -> BadRow:
    return BadRow(
        "invalid_csv",
        f"no CSV: {error}",
        line=line,
        hint="Quotes inside of a quoted field are doubled, and each quote that opens is closed.",
    )


def _header(row: list[str], line: int) -> list[str]:
    names = [name.strip() for name in row]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise BadRow("invalid_csv", f"the header names column '{twice[:60]}' twice", line=line)
    return names


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a row that was read: its first line, its bytes, and whether they are no text."""

    line: int
    size: int
    problem: BadRow | None


class _Lines:
    """The lines of a file for ``csv.reader``, with where the row that it is reading began. A row is as
    short as a line has to be: a quote that is never closed must not take all of a file along."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self._line = self._size = 0
        self._first = 1
        self._problem: BadRow | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self._line, content = next(self._lines)
        self._size += len(content)
        if self._size > MAX_LINE_BYTES:
            raise BadRow(
                "line_too_long",
                f"the row is longer than {MAX_LINE_BYTES} bytes",
                line=self._first,
                hint="Is there a double quote that is never closed?",
            )
        try:
            return decode(content, self._line, code="invalid_csv")
        except BadRow as problem:
            # The row goes on to be read, so that it is known where it ends.
            self._problem = self._problem or problem
            return content.decode("utf-8", "replace")

    def next_row(self) -> _Place:
        """Where the row is that was read; what is read from here on is the next."""
        place = _Place(self._first, self._size, self._problem)
        self._first, self._size, self._problem = self._line + 1, 0, None
        return place
