"""The formats of files of rows: which one a file has, and the reader of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import get_args

from shared.delimited import scan_delimited
from shared.records import BadRow, Record, insist, scan_jsonl, scan_text
from shared.specs import DataFormat

FORMATS: tuple[DataFormat, ...] = get_args(DataFormat)
DELIMITED: dict[str, str] = {"csv": ",", "tsv": "\t"}
_SUFFIXES: dict[str, DataFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file and how it is read."""

    path: Path
    format: DataFormat = "jsonl"
    dataset: str | None = None
    """Of an installed dataset, whose rows were written into the file one a line: its name."""

    @property
    def name(self) -> str:
        return self.path.name if self.dataset is None else f"dataset '{self.dataset}'"

    def place(self, line: int) -> str:
        """Where a row is, in the words of who wrote it. A dataset counts from 0."""
        return f"{self.unit} {line}" if self.dataset is None else f"index {line - 1}"

    @property
    def unit(self) -> str:
        """What its rows are counted in, for messages: Parquet has no lines."""
        return "row" if self.format == "parquet" else "line"


def format_of(name: str) -> DataFormat:
    """By the suffix of the name that a user knows the file by; JSONL where it says nothing."""
    return _SUFFIXES.get(PurePosixPath(name).suffix.lower(), "jsonl")


def read_records(file: DataFile, columns: Collection[str] | None = None) -> Iterator[Record]:
    """The rows of a file, one after another, in constant memory; blank lines are skipped and counted.

    Args:
        columns: Those that are wanted. Parquet decodes no others and gives None for them.

    Raises:
        BadRow: invalid_json, invalid_csv, invalid_parquet, invalid_text or line_too_long, with its
            place.
        OSError: the file cannot be read.
    """
    return insist(scan_records(file, columns))


def scan_records(
    file: DataFile, columns: Collection[str] | None = None
) -> Iterator[Record | BadRow]:
    """As ``read_records``, with a row that cannot be used in its place as what is wrong with it.

    Raises:
        BadRow: what follows cannot be told apart: a header that is none, a quote that is never
            closed, a damaged Parquet file.
        OSError: the file cannot be read.
    """
    if file.format in DELIMITED:
        yield from scan_delimited(file.path, DELIMITED[file.format])
    elif file.format == "parquet":
        # pyarrow takes a while and some 60 MB: only who has such a file pays for it.
        from shared.parquet import scan_parquet

        yield from scan_parquet(file.path, columns)
    elif file.format == "text":
        yield from scan_text(file.path)
    else:
        yield from scan_jsonl(file.path)
