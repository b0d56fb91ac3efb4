"""The data a spec names: found, allowed, and looked through as far as submission can.

Training data is read row by row, because a wrong line would end the job on its devices much
later. Those of a batch job are in ``rows.py``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.submission.paths import allowed_data_file, printable, readable_file
from shared import ids
from shared.errors import DataError
from shared.examples import Chat, Example, Preferred, read_examples
from shared.formats import DataFile, format_of
from shared.messages import Shard
from shared.records import BadRow
from shared.resolved import ResolvedInput
from shared.settings import Settings
from shared.specs import TrainSpec
from shared.store import Store, read


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the job reads."""

    files: dict[str, ResolvedInput]
    longest_text: int | None
    """Bytes of the longest text, where all of the data was seen."""
    labels: frozenset[str] | None = None
    """Labels or tags of the training data, where all of these were seen."""
    chat: str | None = None
    """Where the first chat is, in words."""
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a spec names."""

    path: Path
    own_name: str
    """As its user wrote it, whatever it is stored as."""

    @property
    def name(self) -> str:
        """For messages."""
        return printable(self.own_name)


@dataclass(slots=True)
class _Scanned:
    """What a scan of training data found."""

    file: DataFile
    name: str
    rows: int = 0
    whole: bool = True
    """Not cut short by the scan limit."""
    longest: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    """Label or tag: the line it was first seen on."""
    chat: int | None = None
    """The line of the first chat."""
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Rows by their labels: a split takes its share of each."""


def resolve_training_data(store: Store, settings: Settings, spec: TrainSpec) -> Inputs:
    """The files of a training job, read through up to ``settings.max_scan_bytes`` each.

    Raises:
        DataError: missing, unreadable, of a format that the task cannot read, no rows, fewer than
            two labels, a row that the task cannot read, a label that training lacks.
        PathNotAllowed: outside the allowed folders.
    """
    limit = settings.max_scan_bytes
    scanned: dict[str, _Scanned] = {}
    sources = {"train": spec.data.train, "validation": spec.data.validation}
    for name, source in sources.items():
        # A dataset is of the workers' packages, which are not seen from here.
        if isinstance(source, str):
            param = f"data.{name}"
            found = find_file(store, settings, source, param=param)
            scanned[name] = _scan(found, spec, limit, param=param)
    train, validation = scanned.get("train"), scanned.get("validation")
    if train is not None:
        _check_training(train, spec)
    if validation is not None:
        _check_validation(validation, train)
    files = {name: _resolved(each) for name, each in scanned.items()}
    seen = len(scanned) == sum(source is not None for source in sources.values())
    whole = seen and all(each.whole for each in scanned.values())
    chats = [f"'{s.name}' {s.file.unit} {s.chat}" for s in scanned.values() if s.chat is not None]
    return Inputs(
        files,
        longest_text=max(each.longest for each in scanned.values()) if whole else None,
        labels=frozenset(train.labels) if train is not None and train.whole else None,
        chat=chats[0] if chats else None,
    )


def find_file(store: Store, settings: Settings, reference: str, *, param: str) -> FoundFile:
    """The file behind ``file_…`` or an absolute path.

    Raises:
        DataError: there is no such file.
        PathNotAllowed: a path outside the allowed folders.
    """
    if not reference.startswith("file_"):
        path = allowed_data_file(settings, reference, param=param)
        return FoundFile(path, Path(reference).name)
    file = store.call(read.get_file, reference) if ids.is_id(reference, ids.FILE) else None
    if file is None:
        raise DataError(
            f"{param}: there is no uploaded file '{printable(reference)}'",
            param=param,
            hint="Upload it first (`gpuyard files upload PATH`), or give an absolute path.",
        )
    path = readable_file(settings.data / file.path, shown=reference, param=param)
    return FoundFile(path, file.name)


def _resolved(found: _Scanned) -> ResolvedInput:
    path, rows = found.file.path, found.rows if found.whole else None
    size = path.stat().st_size
    return ResolvedInput(path=str(path), size=size, format=found.file.format, rows=rows)


def _check_training(train: _Scanned, spec: TrainSpec) -> None:
    if not train.rows:
        raise DataError(f"'{train.name}' has no rows", param="data.train")
    if not train.whole:
        return
    if spec.task == "embeddings" and train.rows < 2:
        raise DataError(
            f"'{train.name}' has one pair: there is no other to tell it from", param="data.train"
        )
    _check_labels(train, spec)
    split = spec.data.validation_split
    # Split off label by label, as the training rank does.
    if split is not None and not any(
        min(round(count * split), count - 1) for count in _strata(train, spec)
    ):
        raise DataError(
            f"validation_split {split:g} of {train.rows} rows leaves none for validation",
            param="data.validation_split",
            hint="Give a larger share, or more data.",
        )


def _check_labels(train: _Scanned, spec: TrainSpec) -> None:
    if len(train.labels) >= spec.labels_needed:
        return
    column = spec.data.columns.tags if spec.task == "token-classification" else None
    column = column or spec.data.columns.label
    if not train.labels:
        raise DataError(
            f"'{train.name}' has no label in any row: there is nothing to learn",
            param="data.train",
            hint=f"Check that column '{column}' holds the labels.",
        )
    only = next(iter(train.labels))
    raise DataError(
        f"'{train.name}' has only one label ('{printable(only, 60)}'): there is nothing to learn",
        param="data.train",
        hint=f"Check that column '{column}' is the label.",
    )


def _strata(train: _Scanned, spec: TrainSpec) -> list[int]:
    """Rows of each group that a split takes its share of: by label where a text has one."""
    if spec.task == "text-classification" and spec.problem == "single-label":
        return list(train.counts.values())
    return [train.rows]


def _check_validation(found: _Scanned, train: _Scanned | None) -> None:
    if not found.rows:
        raise DataError(f"'{found.name}' has no rows", param="data.validation")
    if train is None:
        return
    unknown = [label for label in found.labels if label not in train.labels]
    if unknown and train.whole:
        raise DataError(
            f"'{found.name}' {found.file.unit} {found.labels[unknown[0]]}: label "
            f"'{printable(unknown[0], 60)}' does not occur in the training data",
            param="data.validation",
            hint=f"{len(unknown)} label(s) are unknown to training: it could never predict them.",
        )


def _scan(file: FoundFile, spec: TrainSpec, limit: int, *, param: str) -> _Scanned:
    found, seen = _Scanned(_as_read(file, spec, param=param), file.name), 0
    try:
        for placed in read_examples(found.file, spec):
            if seen >= limit:
                found.whole = False
                break
            example = placed.example
            found.rows += 1
            found.longest = max(found.longest, example.size)
            for label in example.labels:
                found.labels.setdefault(label, placed.line)
            if spec.task == "text-classification":
                found.counts[example.labels] += 1
            if found.chat is None and _is_chat(example):
                found.chat = placed.line
            seen += placed.size
    except BadRow as problem:
        place = f" {found.file.unit} {problem.line}" if problem.line else ""
        raise DataError(
            f"'{file.name}'{place}: {printable(problem.message, 400)}",
            param=param,
            hint=problem.hint,
        ) from None
    except OSError as error:
        raise DataError(f"'{file.name}' cannot be read: {error.strerror}", param=param) from None
    return found


def _is_chat(example: Example) -> bool:
    return isinstance(example.chosen if isinstance(example, Preferred) else example, Chat)


def _as_read(file: FoundFile, spec: TrainSpec, *, param: str) -> DataFile:
    """Raises DataError for plain text where the task needs columns."""
    format = format_of(file.own_name) if spec.data.format == "auto" else spec.data.format
    if format == "text" and not spec.reads_plain_text:
        raise DataError(
            f"'{file.name}' is plain text by its name, and task '{spec.task}' reads the columns "
            f"{', '.join(spec.reads)}",
            param=param,
            hint="If it is JSONL or CSV all the same, say so with data.format.",
        )
    return DataFile(file.path, format)
