"""Reading the examples of a training file, in chunks that are tokenised together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.examples import Placed, read_examples
from shared.formats import DataFile
from shared.records import BadRow
from shared.specs import TrainSpec
from workers.ranks.train.columns import Collector
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.order import Indices, derive

__all__ = [
    "Collector",
    "class_of",
    "find_labels",
    "read_chunks",
    "read_rows",
    "split",
    "tokenise",
]

_TOKENISED_TOGETHER = 1024
_BYTES_TOGETHER = 4 * 1024 * 1024
"""Of the file: what is tokenised together takes some ten times as much memory."""
_SHOWN_LABELS = 8


def read_rows(file: DataFile, spec: TrainSpec) -> Iterator[Placed]:
    """The examples of a file.

    Raises:
        DataProblem: the file cannot be read, or a row is malformed: names its line.
    """
    try:
        yield from read_examples(file, spec)
    except BadRow as problem:
        raise DataProblem(
            problem.code,
            problem.message,
            name=file.name,
            place=file.place(problem.line) if problem.line else None,
            hint=problem.hint,
        ) from None
    except OSError as error:
        raise DataProblem(
            "data_unreadable", f"cannot be read: {error.strerror}", name=file.name
        ) from error


def read_chunks(file: DataFile, spec: TrainSpec) -> Iterator[list[Placed]]:
    """The same, many at a time.

    Raises:
        DataProblem: as ``read_rows``, and where there is no row.
    """
    chunk: list[Placed] = []
    none, size = True, 0
    for row in read_rows(file, spec):
        chunk.append(row)
        none, size = False, size + row.size
        if len(chunk) == _TOKENISED_TOGETHER or size >= _BYTES_TOGETHER:
            yield chunk
            chunk, size = [], 0
    if none:
        raise DataProblem("no_rows", "the file has no rows", name=file.name)
    if chunk:
        yield chunk


def find_labels(file: DataFile, spec: TrainSpec, *, at_least: int) -> tuple[str, ...]:
    """The label or tag names of a training file, sorted: as numbers where all are whole numbers.

    Raises:
        DataProblem: as ``read_rows``, no row, or fewer than ``at_least`` different labels.
    """
    numeric: dict[str, bool] = {}
    rows = 0
    for placed in read_rows(file, spec):
        rows += 1
        number = bool(getattr(placed.example, "number", False))
        for label in placed.example.labels:
            numeric[label] = number and numeric.get(label, True)
    if not rows:
        raise DataProblem("no_rows", "the file has no rows", name=file.name)
    if len(numeric) < at_least:
        what = (
            f"all rows have the label '{next(iter(numeric))}'" if numeric else "no row has a label"
        )
        raise DataProblem("one_label", f"{what}: there is nothing to tell apart", name=file.name)
    if all(numeric.values()):
        return tuple(sorted(numeric, key=int))
    return tuple(sorted(numeric))


def class_of(label: str, classes: Mapping[str, int], file: DataFile, line: int) -> int:
    """The index of a label.

    Raises:
        DataProblem: the training data has no such label.
    """
    index = classes.get(label)
    if index is None:
        raise DataProblem(
            "unknown_label",
            f"label '{label}' does not occur in the training data, which has "
            f"{_listed(list(classes))}",
            name=file.name,
            place=file.place(line),
            hint="Correct the label, or add examples of it to the training data.",
        )
    return index


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    *,
    target: bool = False,
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each text with its special tokens, and whether it was cut to ``max_length``.

    ``target``: the texts are what is to be written, which some tokenizers mark in another way.
    """
    argument = "text_target" if target else "text"
    # Whole first: what a cut leaves does not say whether there was one.
    whole: dict[str, Any] = {argument: list(texts)}
    ids: list[list[int]] = tokenizer(**whole, truncation=False, verbose=False)["input_ids"]
    cut = [len(text) > max_length for text in ids]
    for index in [i for i, was_cut in enumerate(cut) if was_cut]:
        part: dict[str, Any] = {argument: texts[index]}
        ids[index] = tokenizer(**part, truncation=True, max_length=max_length, verbose=False)[
            "input_ids"
        ]
    return ids, cut


def split(
    data: Examples, fraction: float, seed: int, *, by: str | None = None
) -> tuple[Indices, Indices]:
    """Split off ``fraction`` for validation: the examples (of training, of validation).

    A function of the data and the seed. ``by`` names a dense column, the class: then the share is
    taken of each class, and training keeps at least one example of each.

    Raises:
        DataProblem: too few examples to split off any.
    """
    generator = np.random.Generator(np.random.Philox(key=derive(seed, "split")))
    classes = np.zeros(len(data)) if by is None else data.dense[by]
    held_out = []
    for value in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == value))
        held_out.append(members[: min(round(len(members) * fraction), len(members) - 1)])
    validation = np.sort(np.concatenate(held_out))
    if not len(validation):
        raise DataProblem(
            "split_empty",
            f"validation_split {fraction} of {len(data)} examples leaves none for validation",
            hint="Give a larger validation_split, or more data.",
        )
    training = np.setdiff1d(np.arange(len(data)), validation)
    return training, validation


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN_LABELS])
    return shown + (", ..." if len(names) > _SHOWN_LABELS else "") if names else "none"
