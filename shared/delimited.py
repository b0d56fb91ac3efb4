"""CSV and TSV as RFC 4180 has them, with a header line: every field is a string."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from shared.records import BadRow, Record, decode, read_lines
from shared.rows import MAX_LINE_BYTES

# The module's own limit is 128 KiB, for the whole process; a row is bounded below in any case.
csv.field_size_limit(MAX_LINE_BYTES)


def read_delimited(path: Path, delimiter: str) -> Iterator[Record]:
    """The rows below the header. A field in double quotes may hold delimiters, newlines, and quotes
    that are doubled. Blank lines are no rows; a column without a name is left out.

    Raises:
        BadRow: invalid_csv or line_too_long, with the line that the row begins on.
        OSError: the file cannot be read.
    """
    lines = _Lines(path)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for row in rows:
            line, size = lines.next_row()
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if names is None:
                names = _header(row, line)
            elif len(row) != len(names):
                raise BadRow(
                    "invalid_csv",
                    f"{len(row)} field(s), and the header names {len(names)}",
                    line=line,
                    hint="A field that holds the delimiter or a newline stands in double quotes.",
                )
            else:
                fields = {name: field for name, field in zip(names, row, strict=True) if name}
                yield Record(line, fields, size)
    except csv.Error as error:
        raise BadRow(
            "invalid_csv",
            f"no CSV: {error}",
            line=lines.next_row()[0],
            hint="Quotes inside of a quoted field are doubled, and each quote that opens is closed.",
        ) from None


def _header(row: list[str], line: int) -> list[str]:
    names = [name.strip() for name in row]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise BadRow("invalid_csv", f"the header names column '{twice[:60]}' twice", line=line)
    return names


class _Lines:
    """The lines of a file for ``csv.reader``, with where the row that it is reading began. A row is as
    short as a line has to be: a quote that is never closed must not take all of a file along."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self._line = self._size = 0
        self._first = 1

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
        return decode(content, self._line, code="invalid_csv")

    def next_row(self) -> tuple[int, int]:
        """(first line, bytes) of the row that was read; what is read from here on is the next."""
        row = self._first, self._size
        self._first, self._size = self._line + 1, 0
        return row
