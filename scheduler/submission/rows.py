"""The input of a batch job: found, made JSONL, counted and cut. A bad row is that row's error, not the
job's, so no row is looked at any closer than that."""

from __future__ import annotations

from pathlib import Path

from scheduler.submission.converting import as_jsonl
from scheduler.submission.data import FoundFile, Inputs, find_file
from scheduler.submission.paths import CONVERTED
from scheduler.submission.repeated import IdCheck
from shared.errors import DataError
from shared.formats import DataFile, format_of
from shared.resolved import ResolvedInput
from shared.rows import MAX_LINE_BYTES, cut_into_shards
from shared.settings import Settings
from shared.specs import InferSpec
from shared.store import Store

_LINE_LIMIT = 8 * MAX_LINE_BYTES
"""A longer line is no row at all but a file of another kind; cutting it would hold it in memory."""
_BLOCK = 1024 * 1024


def resolve_rows(store: Store, settings: Settings, spec: InferSpec) -> Inputs:
    """The input of a batch job, cut into shards.

    Raises:
        DataError: missing, unreadable, without a row, or without a column of text.
        PathNotAllowed: outside the allowed folders.
    """
    found = find_file(store, settings, spec.input or "", param="input")
    file = _as_read(found, spec)
    path = file.path
    try:
        if file.format != "jsonl":
            path = as_jsonl(file, found.name, spec, settings.data / CONVERTED)
        longest = _longest_line(path)
        if longest > _LINE_LIMIT:
            raise DataError(
                f"'{found.name}' has a line of {longest} bytes: it does not look like JSONL",
                param="input",
                hint="Write one JSON object a line, or say with format what it is.",
            )
        ids = IdCheck()
        shards = tuple(cut_into_shards(path, spec.shard_rows, ids.look))
    except OSError as error:
        raise DataError(f"'{found.name}' cannot be read: {error.strerror}", param="input") from None
    if not shards:
        raise DataError(
            f"'{found.name}' has no rows", param="input", hint="Blank lines are no rows."
        )
    resolved = ResolvedInput(
        path=str(path),
        size=path.stat().st_size,
        format=file.format,
        rows=shards[-1].first_row + shards[-1].rows,
        repeated_ids=ids.found(),
    )
    return Inputs({"input": resolved}, longest, shards=shards)


def _as_read(found: FoundFile, spec: InferSpec) -> DataFile:
    format = format_of(found.own_name) if spec.format == "auto" else spec.format
    return DataFile(found.path, format)


def _longest_line(path: Path) -> int:
    """Bytes of the longest line; holds one block, however long the line is."""
    longest = current = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            head, *rest = block.split(b"\n")
            current += len(head)
            if rest:
                longest = max(longest, current, *map(len, rest[:-1]))
                current = len(rest[-1])
    return max(longest, current)
