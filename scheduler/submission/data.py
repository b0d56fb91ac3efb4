"""The data a spec names: found, allowed, and looked through as far as submission can.

Training data is read line by line, because a wrong line would end the job on its devices much
later. The rows of a batch job are only counted and cut: a bad row is that row's error, not the
job's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.submission.paths import allowed_data_file, printable, readable_file
from shared import ids
from shared.errors import DataError
from shared.messages import Shard
from shared.resolved import ResolvedInput
from shared.rows import MAX_LINE_BYTES, cut_into_shards
from shared.settings import Settings
from shared.specs import InferSpec, TextColumns, TrainSpec
from shared.store import Store, read

_LINE_LIMIT = 8 * MAX_LINE_BYTES
"""A longer line is no row at all but a file of another kind; cutting it would hold it in memory."""
_BLOCK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the job reads."""

    files: dict[str, ResolvedInput]
    longest_text: int | None
    """Bytes of the longest text, where all of the data was seen."""
    shards: tuple[Shard, ...] = ()


@dataclass(slots=True)
class _Labelled:
    """What a scan of labelled data found."""

    rows: int = 0
    whole: bool = True
    """Not cut short by the scan limit."""
    longest: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    """Label: the line it was first seen on."""
    counts: Counter[str] = field(default_factory=Counter)


def resolve_training_data(store: Store, settings: Settings, spec: TrainSpec) -> Inputs:
    """The files of a training job, read through up to ``settings.max_scan_bytes`` each.

    Raises:
        DataError: missing, unreadable, no rows, fewer than two labels, a line that is no JSON
            object, lacks a column or has the wrong type in one, a label that training lacks.
        PathNotAllowed: outside the allowed folders.
    """
    limit, columns = settings.max_scan_bytes, spec.data.columns
    train_path, train_name = find_file(store, settings, spec.data.train, param="data.train")
    train = _scan(train_path, train_name, columns, limit, param="data.train")
    _check_training(train, train_name, spec)
    files = {"train": _resolved(train_path, train)}
    longest = train.longest if train.whole else None
    if spec.data.validation is not None:
        param = "data.validation"
        path, name = find_file(store, settings, spec.data.validation, param=param)
        found = _scan(path, name, columns, limit, param=param)
        _check_validation(found, name, train)
        files["validation"] = _resolved(path, found)
        whole = longest is not None and found.whole
        longest = max(train.longest, found.longest) if whole else None
    return Inputs(files, longest)


def resolve_rows(store: Store, settings: Settings, spec: InferSpec) -> Inputs:
    """The input of a batch job, cut into shards.

    Raises:
        DataError: missing, unreadable, or without a row.
        PathNotAllowed: outside the allowed folders.
    """
    path, name = find_file(store, settings, spec.input or "", param="input")
    longest = _longest_line(path)
    if longest > _LINE_LIMIT:
        raise DataError(
            f"'{name}' has a line of {longest} bytes: it does not look like JSONL",
            param="input",
            hint="Write one JSON object a line.",
        )
    shards = tuple(cut_into_shards(path, spec.shard_rows))
    if not shards:
        raise DataError(f"'{name}' has no rows", param="input", hint="Blank lines are no rows.")
    rows = shards[-1].first_row + shards[-1].rows
    size = path.stat().st_size
    return Inputs({"input": ResolvedInput(path=str(path), size=size, rows=rows)}, longest, shards)


def find_file(store: Store, settings: Settings, reference: str, *, param: str) -> tuple[Path, str]:
    """(path, name for people) behind ``file_…`` or an absolute path.

    Raises:
        DataError: there is no such file.
        PathNotAllowed: a path outside the allowed folders.
    """
    if not reference.startswith("file_"):
        path = allowed_data_file(settings, reference, param=param)
        return path, printable(path.name)
    file = store.call(read.get_file, reference) if ids.is_id(reference, ids.FILE) else None
    if file is None:
        raise DataError(
            f"{param}: there is no uploaded file '{printable(reference)}'",
            param=param,
            hint="Upload it first (`gpuyard files upload PATH`), or give an absolute path.",
        )
    path = readable_file(settings.data / file.path, shown=reference, param=param)
    return path, printable(file.name)


def _resolved(path: Path, found: _Labelled) -> ResolvedInput:
    rows = found.rows if found.whole else None
    return ResolvedInput(path=str(path), size=path.stat().st_size, rows=rows)


def _check_training(train: _Labelled, name: str, spec: TrainSpec) -> None:
    if not train.rows:
        raise DataError(f"'{name}' has no rows", param="data.train")
    if not train.whole:
        return
    if len(train.labels) < 2:
        only = next(iter(train.labels))
        raise DataError(
            f"'{name}' has only one label ('{printable(only, 60)}'): there is nothing to learn",
            param="data.train",
            hint=f"Check that column '{spec.data.columns.label}' is the label.",
        )
    split = spec.data.validation_split
    # Split off label by label, as the training rank does.
    if split is not None and not any(
        min(round(count * split), count - 1) for count in train.counts.values()
    ):
        raise DataError(
            f"validation_split {split:g} of {train.rows} rows leaves none for validation",
            param="data.validation_split",
            hint="Give a larger share, or more data.",
        )


def _check_validation(found: _Labelled, name: str, train: _Labelled) -> None:
    if not found.rows:
        raise DataError(f"'{name}' has no rows", param="data.validation")
    unknown = [label for label in found.labels if label not in train.labels]
    if unknown and train.whole:
        raise DataError(
            f"'{name}' line {found.labels[unknown[0]]}: label '{printable(unknown[0], 60)}' "
            "does not occur in the training data",
            param="data.validation",
            hint=f"{len(unknown)} label(s) are unknown to training: it could never predict them.",
        )


def _scan(path: Path, name: str, columns: TextColumns, limit: int, *, param: str) -> _Labelled:
    found = _Labelled()
    for number, line in _lines(path, name, limit, found, param=param):
        where = f"'{name}' line {number}"
        text, label = _labelled(line, where, columns, number == 1, param=param)
        found.rows += 1
        found.longest = max(found.longest, len(text.encode(errors="replace")))
        found.labels.setdefault(label, number)
        found.counts[label] += 1
    return found


def _lines(
    path: Path, name: str, limit: int, found: _Labelled, *, param: str
) -> Iterator[tuple[int, bytes]]:
    read_bytes = number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"'{name}' line {number} is longer than {MAX_LINE_BYTES} bytes", param=param
                )
            if line.strip():
                yield number, line
            read_bytes += len(line)
            if read_bytes >= limit:
                found.whole = not file.read(1)
                return


def _labelled(
    line: bytes, where: str, columns: TextColumns, first: bool, *, param: str
) -> tuple[str, str]:
    try:
        row: Any = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte {error.start})",
            param=param,
            hint="Save the file as UTF-8.",
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is no JSON: {error.msg} at column {error.colno}",
            param=param,
            hint="The file must be JSONL: one JSON object a line.",
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{where} is no JSON that can be read", param=param) from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object but {_kind(row)}", param=param)
    for column, key in ((columns.text, "text"), (columns.label, "label")):
        if column not in row:
            has = ", ".join(printable(str(k), 40) for k in list(row)[:8]) or "nothing"
            raise DataError(
                f"{where} has no column '{printable(column, 60)}'; it has {has}",
                param=param,
                hint=f'Name your column with data.columns: {{"{key}": "<your column>"}}.',
            )
    text, label = row[columns.text], row[columns.label]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: column '{columns.text}' must be a string, not {_kind(text)}", param=param
        )
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(
            f"{where}: column '{columns.label}' must be a string or an integer, not {_kind(label)}",
            param=param,
        )
    return text, str(label)


def _longest_line(path: Path) -> int:
    """Bytes of the longest line; holds one block, however long the line is."""
    longest = current = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            head, *rest = block.split(b"\n")
            current += len(head)
            if rest:
                longest = (
                    max(longest, current, *map(len, rest[:-1]))
                    if rest[:-1]
                    else max(longest, current)
                )
                current = len(rest[-1])
    return max(longest, current)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
