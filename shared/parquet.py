"""Parquet, a few rows in memory at a time. Beside ``result_file.py`` the only module with pyarrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.records import BadRow, Record

_ROWS_TOGETHER = 128
_BUFFER = 1024 * 1024
"""Bytes of a column that are read ahead: without it a column of a whole row group is."""
_MAX_FOOTER_ITEM = 64 * 1024 * 1024
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What damage shows as. pyarrow's I/O errors are ``OSError`` without a number."""


def scan_parquet(path: Path, columns: Collection[str] | None = None) -> Iterator[Record | BadRow]:
    """The rows, with their number from 1 as line; lists and structs come as lists and objects.

    A row's size is its share of the row groups, uncompressed: what reading it costs. A row with a value
    that cannot be read is invalid_parquet.

    Args:
        columns: Those that are decoded, so that a column of a kind that nobody asked for does no
            harm; the others are None. All by default.

    Raises:
        BadRow: invalid_parquet: the file is damaged, with the row from which on.
        OSError: the file cannot be read.
    """
    with path.open("rb"):
        pass  # what is wrong with the path is the system's to say, not pyarrow's
    row = 0
    try:
        with pq.ParquetFile(
            path,
            buffer_size=_BUFFER,
            thrift_string_size_limit=_MAX_FOOTER_ITEM,
            thrift_container_size_limit=_MAX_FOOTER_ITEM,
        ) as file:
            names = list(dict.fromkeys(file.schema_arrow.names))
            wanted = [name for name in names if columns is None or name in columns]
            others = dict.fromkeys(name for name in names if name not in wanted)
            size = _row_size(file.metadata)
            if not wanted:
                yield from (
                    Record(n + 1, dict(others), size) for n in range(file.metadata.num_rows)
                )
                return
            for batch in file.iter_batches(_ROWS_TOGETHER, columns=wanted, use_threads=False):
                for found in _rows_of(batch, row):
                    row += 1
                    if isinstance(found, BadRow):
                        yield found
                    else:
                        yield Record(row, found | others, size)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(error, row) from None


def _rows_of(batch: pa.RecordBatch, before: int) -> Iterator[dict[str, Any] | BadRow]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except _UNREADABLE:
        # Not UTF-8, or a date before all dates: once more, one by one, to find which row it is.
        for index in range(batch.num_rows):
            yield _row_of(batch.slice(index, 1), before + index + 1)
        return
    yield from rows


def _row_of(batch: pa.RecordBatch, line: int) -> dict[str, Any] | BadRow:
    """The one row of a batch."""
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            [row[name]] = column.to_pylist()
        except _UNREADABLE as error:
            what = f"a value cannot be read in column '{name}': {_first_line(error)}"
            return BadRow("invalid_parquet", what, line=line)
    return row


def _row_size(metadata: pq.FileMetaData) -> int:
    groups = range(metadata.num_row_groups)
    total: int = sum(metadata.row_group(index).total_byte_size for index in groups)
    rows: int = metadata.num_rows
    return max(1, total // max(1, rows))


def _damaged(error: Exception, row: int) -> BadRow:
    where = f"no Parquet that can be read beyond row {row}" if row else "no Parquet file"
    return BadRow(
        "invalid_parquet",
        f"{where}, or it is damaged: {_first_line(error)}",
        hint="Write it again, or set data.format if it is of another kind.",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
