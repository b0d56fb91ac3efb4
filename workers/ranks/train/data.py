"""Labelled text: read once from JSONL, tokenised once, kept as one flat array of token ids.

Texts are not kept: a token costs 4 bytes, and an example about 20 more.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from shared.specs import TextColumns
from workers.ranks.train.failures import DataProblem
from workers.ranks.train.order import Indices, derive

_TOKENISED_TOGETHER = 1024
_SHOWN_LABELS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded to its longest text. ``inputs`` are [examples, tokens]; ``labels`` [examples]."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    tokens: int
    """Without padding."""

    def to(self, device: torch.device) -> Batch:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.tokens)


class LabelledTexts(Dataset[tuple[NDArray[np.int32], int]]):
    """Tokenised texts with class indices."""

    def __init__(
        self,
        tokens: NDArray[np.int32],
        ends: NDArray[np.int64],
        labels: NDArray[np.int64],
        cut: NDArray[np.bool_],
    ) -> None:
        self._tokens = tokens
        self._starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        self._ends = ends
        self.labels = labels
        self.lengths: NDArray[np.int32] = (self._ends - self._starts).astype(np.int32)
        self.cut = cut

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], int]:
        """The token ids and the class index of one example."""
        return self._tokens[self._starts[index] : self._ends[index]], int(self.labels[index])

    def batch(self, indices: Indices | Sequence[int], pad: int) -> Batch:
        """Collate examples, padded with token ``pad`` to the longest of them."""
        width = max(1, int(self.lengths[np.asarray(indices)].max()))
        ids = np.full((len(indices), width), pad, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        labels = np.empty(len(indices), dtype=np.int64)
        for row, index in enumerate(indices):
            tokens, labels[row] = self[int(index)]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return Batch(inputs, torch.from_numpy(labels), int(mask.sum()))

    def subset(self, indices: Indices) -> LabelledTexts:
        """A copy of some examples, in the order given."""
        parts = [self._tokens[self._starts[i] : self._ends[i]] for i in indices]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        ends = np.cumsum(self.lengths[indices], dtype=np.int64)
        return LabelledTexts(tokens, ends, self.labels[indices], self.cut[indices])

    @property
    def largest_token(self) -> int:
        return int(self._tokens.max(initial=0))

    def digest(self) -> str:
        """SHA-256 over all tokens, lengths and labels: equal for data that train alike."""
        sha = hashlib.sha256()
        for values in (self._tokens, self._ends, self.labels):
            sha.update(values.tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file. ``label`` is the name; ``number`` says that it was written as one."""

    line: int
    text: str
    label: str
    number: bool


def find_labels(path: Path, columns: TextColumns) -> tuple[str, ...]:
    """The label names of a training file, sorted: as numbers where all are whole numbers.

    Raises:
        DataProblem: the file is missing or empty, a line is malformed, or there is one label only.
    """
    numeric: dict[str, bool] = {}
    for row in read_rows(path, columns):
        numeric[row.label] = row.number and numeric.get(row.label, True)
    if not numeric:
        raise DataProblem("no_rows", "the file has no rows", name=path.name)
    if len(numeric) == 1:
        raise DataProblem(
            "one_label",
            f"all rows have the label '{next(iter(numeric))}': there is nothing to tell apart",
            name=path.name,
        )
    if all(numeric.values()):
        return tuple(sorted(numeric, key=int))
    return tuple(sorted(numeric))


def read_texts(
    path: Path,
    columns: TextColumns,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> LabelledTexts:
    """Read and tokenise a file; longer texts are cut to ``max_length`` tokens.

    Raises:
        DataProblem: as ``find_labels``, and for a label that is not among ``labels``.
    """
    classes = {name: index for index, name in enumerate(labels)}
    tokens, ends, targets, cut = array("i"), array("q"), array("q"), array("b")
    for rows in _chunks(read_rows(path, columns)):
        for row in rows:
            targets.append(_class_of(row, classes, path))
        # Tokenised whole first: what a cut leaves does not say whether there was one.
        texts = [row.text for row in rows]
        ids = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        cut.extend(len(text) > max_length for text in ids)
        if any(len(text) > max_length for text in ids):
            ids = tokenizer(texts, truncation=True, max_length=max_length, verbose=False)[
                "input_ids"
            ]
        for text in ids:
            tokens.extend(text)
            ends.append(len(tokens))
    if not targets:
        raise DataProblem("no_rows", "the file has no rows", name=path.name)
    return LabelledTexts(
        np.frombuffer(tokens, np.int32),
        np.frombuffer(ends, np.int64),
        np.frombuffer(targets, np.int64),
        np.frombuffer(cut, np.bool_),
    )


def split(data: LabelledTexts, fraction: float, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    """Split off ``fraction`` of each label for validation: (training, validation).

    A function of the data and the seed. Training keeps at least one example of each label.

    Raises:
        DataProblem: too few examples to split off any.
    """
    generator = np.random.Generator(np.random.Philox(key=derive(seed, "split")))
    held_out = []
    for label in np.unique(data.labels):
        members = generator.permutation(np.flatnonzero(data.labels == label))
        held_out.append(members[: min(round(len(members) * fraction), len(members) - 1)])
    validation = np.sort(np.concatenate(held_out))
    if not len(validation):
        raise DataProblem(
            "split_empty",
            f"validation_split {fraction} of {len(data)} examples leaves none for validation",
            hint="Give a larger validation_split, or more data.",
        )
    training = np.setdiff1d(np.arange(len(data)), validation)
    return data.subset(training), data.subset(validation)


def read_rows(path: Path, columns: TextColumns) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are skipped and counted.

    Raises:
        DataProblem: names the line and what is wrong with it.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataProblem(
            "data_unreadable", f"cannot be read: {error.strerror}", name=path.name
        ) from error
    with file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                yield _parse(content, line, columns, path.name)


def _parse(content: bytes, line: int, columns: TextColumns, name: str) -> Row:
    try:
        record = json.loads(content)
    except ValueError as error:
        what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"is no JSON: {error}"
        raise DataProblem("invalid_json", f"the line {what}", name=name, line=line) from None
    if not isinstance(record, dict):
        raise DataProblem("invalid_json", "the line is JSON and no object", name=name, line=line)
    text = _column(record, columns.text, "text", line, name)
    label = _column(record, columns.label, "label", line, name)
    if not isinstance(text, str):
        raise DataProblem(
            "invalid_text",
            f"column '{columns.text}' must be text, not {text!r}",
            name=name,
            line=line,
        )
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataProblem(
            "invalid_label",
            f"column '{columns.label}' must be text or a whole number, not {label!r}",
            name=name,
            line=line,
        )
    return Row(line=line, text=text, label=str(label), number=isinstance(label, int))


def _column(record: Mapping[str, object], column: str, role: str, line: int, name: str) -> object:
    if column not in record:
        raise DataProblem(
            "missing_column",
            f"there is no column '{column}'; the line has {_listed(sorted(record))}",
            name=name,
            line=line,
            hint=f"Name the right one in data.columns.{role}.",
        )
    return record[column]


def _class_of(row: Row, classes: Mapping[str, int], path: Path) -> int:
    index = classes.get(row.label)
    if index is None:
        raise DataProblem(
            "unknown_label",
            f"label '{row.label}' does not occur in the training data, which has "
            f"{_listed(list(classes))}",
            name=path.name,
            line=row.line,
            hint="Correct the label, or add examples of it to the training data.",
        )
    return index


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _TOKENISED_TOGETHER:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN_LABELS])
    return shown + (", ..." if len(names) > _SHOWN_LABELS else "") if names else "none"
