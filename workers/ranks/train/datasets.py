"""Datasets of packages that the operator has installed beside the workers.

A package declares them as entry points of the group ``gpuyard.datasets``: a name, and what makes the
dataset when it is called with the spec's options. Rank 0 makes it and writes its rows as JSONL into the
attempt's folder, from where all ranks read them as they read any file: the same rules, the same
messages, the same cache of tokens by content. Its code runs in that one process, once an attempt.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from shared.cells import typed
from shared.examples import parse_example
from shared.lifecycle import FailureClass
from shared.messages import TrainAssignment
from shared.records import BadRow, kind_of
from shared.specs import InstalledDataset, TrainSpec
from workers.ranks.folders import first_line
from workers.ranks.train.failures import DataProblem, TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.reports import Reporter

GROUP = "gpuyard.datasets"
_FOLDER = "rows"
_POLL_SECONDS = 0.1
_ORDERS_EVERY = 1000
"""Rows between two looks at the worker's orders."""


def write_out_datasets(
    assignment: TrainAssignment, gang: Gang, reporter: Reporter
) -> TrainAssignment:
    """The assignment with a file for each dataset that its spec names. The others wait for rank 0.

    Raises:
        TrainingFailed: there is no such dataset, or it cannot be made or read (user_error).
        DataProblem: a row cannot be used.
        Stopped: the worker ordered it, or is gone.
    """
    data, folder = assignment.spec.data, Path(assignment.work_dir) / _FOLDER
    changes: dict[str, str] = {}
    for name, source in (("train", data.train), ("validation", data.validation)):
        if isinstance(source, InstalledDataset):
            path = folder / f"{name}.jsonl"
            if gang.rank == 0:
                _write_out(source, assignment.spec, path, reporter)
            changes |= {f"{name}_path": str(path), f"{name}_format": "jsonl"}
    if not changes:
        return assignment
    if gang.rank != 0:
        # Not by the store's own timeout: a dataset may take hours.
        gang.wait_for("datasets", lambda: reporter.check_orders(wait=_POLL_SECONDS))
    gang.share("datasets", None)
    return assignment.model_copy(update=changes)


def forget_datasets(assignment: TrainAssignment) -> None:
    """Delete the files again, which only the ranks of this attempt read."""
    if assignment.rank == 0:
        shutil.rmtree(Path(assignment.work_dir) / _FOLDER, ignore_errors=True)


def _write_out(source: InstalledDataset, spec: TrainSpec, path: Path, reporter: Reporter) -> None:
    began, count = time.monotonic(), 0
    dataset = make_dataset(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in _lines(dataset, source.dataset, spec):
            if count % _ORDERS_EVERY == 0:
                reporter.check_orders()
            file.write(line)
            count += 1
    seconds = time.monotonic() - began
    reporter.say(
        f"dataset '{source.dataset}': {count:,} rows of {type(dataset).__name__}, {seconds:.1f} s"
    )


def make_dataset(source: InstalledDataset) -> Any:
    """The dataset, of which ``len`` and an item by its index can be asked.

    Raises:
        TrainingFailed: unknown_dataset, dataset_failed, dataset_options or dataset_unsuitable.
    """
    name = source.dataset
    entry = _find(name)
    try:
        factory = entry.load()
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"dataset '{name}' cannot be imported", error) from error
    _require_fitting_options(factory, source)
    try:
        dataset = factory(**source.options)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"dataset '{name}' cannot be made", error) from error
    asked = all(hasattr(type(dataset), each) for each in ("__len__", "__getitem__"))
    # A Dataset has __getitem__, if only one that raises; what is iterable alone has no places.
    if not asked or isinstance(dataset, IterableDataset | Mapping | str):
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "dataset_unsuitable",
            f"dataset '{name}' is made as a {type(dataset).__name__}, which is no map-style dataset",
            "It needs __len__ and __getitem__ for indices from 0, as torch.utils.data.Dataset has "
            "them. One that can only be iterated over has no place to resume from.",
        )
    return dataset


def _find(name: str) -> EntryPoint:
    # A package may have been installed after the process that this one was forked from had started.
    importlib.invalidate_caches()
    installed = entry_points(group=GROUP)
    found = {entry.value: entry for entry in installed.select(name=name)}
    if not found:
        names = ", ".join(sorted({f"'{entry.name}'" for entry in installed}))
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "unknown_dataset",
            f"there is no dataset '{name}' where the worker runs; installed: {names or 'none'}",
            f"Install its package in the workers' environment; it declares an entry point '{name}' of "
            f"the group '{GROUP}'.",
        )
    if len(found) > 1:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "ambiguous_dataset",
            f"several packages declare a dataset '{name}': {', '.join(sorted(found))}",
            "Uninstall all but one where the workers run, or rename theirs.",
        )
    return next(iter(found.values()))


def _require_fitting_options(factory: Any, source: InstalledDataset) -> None:
    if not callable(factory):
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "dataset_unsuitable",
            f"dataset '{source.dataset}' is declared as a {type(factory).__name__}, which cannot be called",
            "Its entry point names a class, or a function that makes the dataset.",
        )
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a few built-ins nothing is known
        return
    try:
        signature.bind(**source.options)
    except TypeError as error:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "dataset_options",
            f"dataset '{source.dataset}' does not take these options: {error}",
            f"It takes {', '.join(signature.parameters) or 'none'}.",
        ) from None


def _lines(dataset: Any, name: str, spec: TrainSpec) -> Iterator[str]:
    """Each row as a line of JSON, checked as a row of a file is, and of its columns what the task reads."""
    wanted = [getattr(spec.data.columns, role) for role in spec.reads]
    try:
        count = len(dataset)
    except Exception as error:
        raise _failed(f"dataset '{name}' does not tell its length", error) from error
    for index in range(count):
        try:
            row = dataset[index]
        except MemoryError:
            raise
        except Exception as error:
            raise _failed(
                f"dataset '{name}' does not give row {index} of {count}", error
            ) from error
        try:
            yield _line(row, wanted, spec)
        except BadRow as problem:
            raise DataProblem(
                problem.code,
                problem.message,
                name=f"dataset '{name}'",
                place=f"index {index}",
                hint=problem.hint,
            ) from None


def _line(row: Any, wanted: list[str], spec: TrainSpec) -> str:
    if not isinstance(row, Mapping):
        raise BadRow(
            "invalid_row",
            f"a row must be a dict of columns, not {kind_of(row)}",
            hint='For instance {"text": "…", "label": "…"}.',
        )
    fields = {str(column): _plain(value) for column, value in row.items()}
    # A column that is None is none, as in Parquet.
    parse_example(typed(fields, "parquet", spec), spec)
    kept = {column: fields[column] for column in wanted if column in fields}
    try:
        return json.dumps(kept, ensure_ascii=False).encode().decode() + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("invalid_row", f"the row holds what is no JSON: {first_line(error)}") from None


def _plain(value: Any) -> Any:
    """Numbers and lists as JSON has them, of what NumPy and torch make of them."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _failed(what: str, error: BaseException) -> TrainingFailed:
    """With the place in the dataset's own code: its author has no other trace of it."""
    # The first frame is the call from here.
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return TrainingFailed(
        FailureClass.USER_ERROR,
        "dataset_failed",
        f"{what}: {type(error).__name__}: {first_line(error)}{place}",
        "The dataset's own code raised this, with the options of the spec.",
    )
