"""What the cells of a CSV file stand for, and the nulls of a Parquet file. Pure.

CSV knows strings only. What a task wants otherwise is read from them:

- a label that looks like a whole number is one, so that 10 sorts behind 9; ``007`` is a name;
- the score of a regression is a number (``0.5``, ``1e-3``);
- the labels of multi-label are a JSON list (``["a", "b"]``); an empty cell is none;
- tokens and tags are a JSON list of strings, or words with spaces between them;
- messages are JSON;
- in text-generation an empty cell is as if the row had no such column: the columns that are filled
  decide the form of the row. So is a null of a Parquet file, which stands for the same.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shared.formats import DELIMITED
from shared.records import BadRow
from shared.specs import DataFormat, TrainSpec

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def typed(fields: dict[str, Any], format: DataFormat, spec: TrainSpec) -> dict[str, Any]:
    """The fields of a row as JSONL would have them.

    Raises:
        BadRow: invalid_label or invalid_messages, where a cell is no JSON and has to be.
    """
    columns, cells = spec.data.columns, format in DELIMITED
    if spec.task == "text-generation":
        return _filled(fields, spec, cells=cells)
    if not cells:
        return fields
    if spec.task == "text-classification":
        return _replaced(fields, columns.label, lambda cell: _label(cell, columns.label, spec))
    if spec.task == "token-classification":
        fields = _replaced(fields, columns.tokens, words_of)
        return _replaced(fields, columns.tags, words_of)
    return fields


def _replaced(fields: dict[str, Any], name: str, read: Any) -> dict[str, Any]:
    return {**fields, name: read(fields[name])} if name in fields else fields


def _label(cell: str, column: str, spec: TrainSpec) -> Any:
    if spec.problem == "regression":
        return _number(cell)
    if spec.problem == "multi-label":
        if not cell.strip():
            return []
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            raise BadRow(
                "invalid_label",
                f"column '{column}' must be a JSON list, not {cell[:40]!r}",
                hint='Write the labels of a text as ["a", "b"].',
            ) from None
    return int(cell) if _WHOLE.fullmatch(cell) else cell


def _number(cell: str) -> float | str:
    try:
        return cell if "_" in cell else float(cell)
    except ValueError:
        return cell


def words_of(cell: str) -> list[str]:
    """The words of a cell: a JSON list of strings, or what has spaces between. ``[`` may also be a word
    of a text: only a list of strings is taken for JSON."""
    try:
        found = json.loads(cell) if cell.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and all(isinstance(word, str) for word in found):
        return found
    return cell.split()


def _filled(fields: dict[str, Any], spec: TrainSpec, *, cells: bool) -> dict[str, Any]:
    columns = spec.data.columns
    nothing = (None, "") if cells else (None,)
    absent = {name for name in (columns.messages,) if fields.get(name) in nothing}
    if spec.preference is None and fields.get(columns.completion) in nothing:
        absent.add(columns.completion)
        # With a completion, an empty prompt is one; without, it says nothing.
        if fields.get(columns.prompt) in nothing:
            absent.add(columns.prompt)
    kept = {name: value for name, value in fields.items() if name not in absent}
    if cells and columns.messages in kept:
        kept[columns.messages] = _messages(kept[columns.messages], columns.messages)
    return kept


def _messages(cell: str, column: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            "invalid_messages",
            f"column '{column}' holds no JSON: {str(error)[:80]}",
            hint='Write a chat as [{"role": "user", "content": "…"}, …].',
        ) from None
