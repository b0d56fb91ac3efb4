"""CSV, TSV, Parquet and plain text as the JSONL that batch jobs read, written once at submission.

Workers then read ranges of bytes whatever the file was, and a retry reads what the first attempt read.
Row *n* of what is written is row *n* of the file; one that cannot be taken is written as its error
(``shared.rows.refused_row``), which becomes the error of that row and not of the job. Only the columns
that a batch job reads are kept: those of the task, ``id`` and ``generation``.

All cells of CSV are strings, so ``messages``, ``tokens`` and ``generation`` are read as JSON there, tokens
also as words with spaces between. Where a row may have its text in one of two columns, an empty cell and
a null of Parquet are as if it had no such column; an id that is empty is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from scheduler.submission.paths import printable
from scheduler.submission.writing import write_lines
from shared.cells import words_of
from shared.errors import DataError
from shared.formats import DELIMITED, DataFile, scan_records
from shared.records import BadRow, Record, kind_of
from shared.rows import refused_row
from shared.specs import OF_A_ROW, DataFormat, InferSpec

_AS_TEXT = (date, datetime, time, Decimal)
"""What Parquet knows and JSON writes as a string."""


def as_jsonl(file: DataFile, name: str, spec: InferSpec, folder: Path) -> Path:
    """The rows of ``file`` as JSONL in ``folder``, one in memory at a time.

    Args:
        name: Of the file, for messages.

    Raises:
        DataError: the file cannot be read to its end, no row of it can be, or it has no column with the
            text.
    """
    try:
        return write_lines(folder, _lines(file, name, spec))
    except BadRow as problem:
        place = f" {file.unit} {problem.line}" if problem.line else ""
        raise DataError(
            f"'{name}'{place}: {printable(problem.message, 400)}",
            param="input",
            hint=(problem.hint or "").replace("data.format", "format") or None,
        ) from None


def _lines(file: DataFile, name: str, spec: InferSpec) -> Iterator[bytes]:
    columns = {"id", OF_A_ROW}.union(*spec.forms)
    seen, first_problem = False, None
    for found in scan_records(file, columns):
        if isinstance(found, Record) and not seen:
            _require_column(found, file, name, spec)
            seen = True
        try:
            if isinstance(found, BadRow):
                raise found
            yield _line(_row(found.fields, file.format, spec))
        except BadRow as problem:
            first_problem = first_problem or problem
            said = f"{file.unit} {problem.line or found.line}: {problem.message}"
            id = found.fields.get("id") if isinstance(found, Record) else None
            id = id if isinstance(id, str | int) else None
            yield _line(
                refused_row(problem.code, printable(said, 400), id=None if id == "" else id)
            )
    if first_problem is not None and not seen:
        # Not one row is what the format says: it is a file of another kind.
        raise first_problem


def _require_column(first: Record, file: DataFile, name: str, spec: InferSpec) -> None:
    """All rows have the same columns: what is missing here is missing in all."""
    if file.format == "text" or any(form[-1] in first.fields for form in spec.forms):
        return
    wanted = " or ".join(f"'{form[-1]}'" for form in spec.forms)
    names = ", ".join(f"'{printable(column, 40)}'" for column in list(first.fields)[:8])
    more = ", …" if len(first.fields) > 8 else ""
    raise DataError(
        f"'{name}' has no column {wanted}; it has {names or 'none with a name'}{more}",
        param="input",
        hint="Name the column that has the text with text_column.",
    )


_LISTS = {"messages": "invalid_messages", "documents": "invalid_documents"}
"""Columns that hold JSON where all cells are strings, and what a row is told that has none."""


def _row(fields: dict[str, Any], format: DataFormat, spec: InferSpec) -> dict[str, Any]:
    if format == "text":
        return {spec.forms[0][-1]: fields["text"]}
    cells = format in DELIMITED
    there = [form for form in spec.forms if form[-1] in fields]
    filled = [form for form in there if fields[form[-1]] not in (None, "", [])]
    kept = {name: fields[name] for form in filled or there[:1] for name in form if name in fields}
    for column, code in _LISTS.items():
        if cells and spec.text_column is None and isinstance(cell := kept.get(column), str):
            kept[column] = _json(cell, column, code)
    if cells and spec.text_column is None and isinstance(cell := kept.get("tokens"), str):
        kept["tokens"] = words_of(cell)
    if fields.get("id") not in (None, ""):
        kept["id"] = fields["id"]
    if own := fields.get(OF_A_ROW):
        own = _json(own, OF_A_ROW, "invalid_generation") if isinstance(own, str) else own
        if not isinstance(own, dict):
            what = f"column '{OF_A_ROW}' must be an object, not {kind_of(own)}"
            raise BadRow("invalid_generation", what)
        # A struct of Parquet has all of its fields in every row.
        kept[OF_A_ROW] = {name: value for name, value in own.items() if value is not None}
    return kept


def _json(cell: str, column: str, code: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise BadRow(code, f"column '{column}' holds no JSON: {str(error)[:80]}") from None


def _line(row: dict[str, Any]) -> bytes:
    """Raises BadRow: a value that JSON has not; names its column."""
    try:
        return (_dump(row) + "\n").encode()
    except (TypeError, ValueError):
        for name, value in row.items():
            try:
                _dump(value).encode()
            except UnicodeEncodeError:
                what = f"column '{name}' holds half of a surrogate pair"
                raise BadRow("invalid_utf8", what) from None
            except (TypeError, ValueError) as error:
                what = f"column '{name}' cannot be kept as JSON: {error}"
                raise BadRow("unsupported_value", what) from None
        raise


def _dump(value: Any) -> str:
    return json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_plain
    )


def _plain(value: Any) -> str:
    if isinstance(value, _AS_TEXT):
        return str(value) if isinstance(value, Decimal) else value.isoformat()
    raise TypeError(f"it holds {kind_of(value)}")
