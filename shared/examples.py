"""Training examples: what a row has to hold for each task. Pure.

Submission looks a file through with these functions before anything runs, and the ranks read it with
the same ones: what the one accepts, the other can use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shared.cells import typed
from shared.formats import DataFile, read_records
from shared.records import BadRow, kind_of
from shared.specs import SEQ2SEQ, Columns, TrainSpec

ROLES = ("system", "user", "assistant")
_SHOWN = 8
_LEARNED = frozenset({"target", "completion", "positive", "chosen", "rejected"})
"""Columns that must not be empty."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """text-classification. ``number`` says that the labels were written as whole numbers."""

    text: str
    labels: tuple[str, ...]
    number: bool = False

    @property
    def size(self) -> int:
        return _bytes(self.text)


@dataclass(frozen=True, slots=True)
class Scored:
    """text-classification as regression."""

    text: str
    value: float

    labels = ()

    @property
    def size(self) -> int:
        return _bytes(self.text)


@dataclass(frozen=True, slots=True)
class Tagged:
    """token-classification: a tag for each word."""

    words: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(map(_bytes, self.words)) + len(self.words)


@dataclass(frozen=True, slots=True)
class Pair:
    """text2text: what is read and what is to be written. embeddings: two texts that belong together."""

    text: str
    other: str

    labels = ()

    @property
    def size(self) -> int:
        return max(_bytes(self.text), _bytes(self.other))


@dataclass(frozen=True, slots=True)
class Passage:
    """fill-mask and text-generation on plain text: all of it is learned."""

    text: str

    labels = ()

    @property
    def size(self) -> int:
        return _bytes(self.text)


@dataclass(frozen=True, slots=True)
class Completion:
    """text-generation: ``completion`` is learned, ``prompt`` is given."""

    prompt: str
    completion: str

    labels = ()

    @property
    def size(self) -> int:
        return _bytes(self.prompt) + _bytes(self.completion)


@dataclass(frozen=True, slots=True)
class Chat:
    """text-generation: (role, content) of each turn. The assistant's are learned."""

    turns: tuple[tuple[str, str], ...]

    labels = ()

    @property
    def size(self) -> int:
        return sum(_bytes(content) + 16 for _, content in self.turns)


@dataclass(frozen=True, slots=True)
class Preferred:
    """text-generation with ``preference``: two answers to one prompt or conversation, whose last turn
    each then is."""

    chosen: Completion | Chat
    rejected: Completion | Chat

    labels = ()

    @property
    def size(self) -> int:
        return max(self.chosen.size, self.rejected.size)


Example = Labelled | Scored | Tagged | Pair | Passage | Completion | Chat | Preferred


@dataclass(frozen=True, slots=True)
class Placed:
    """An example and where it came from; ``size`` is what it took of the file, in bytes."""

    line: int
    example: Example
    size: int


def read_examples(file: DataFile, spec: TrainSpec) -> Iterator[Placed]:
    """The examples of a training file, one after another.

    Raises:
        BadRow: names the line, what is wrong with it, and what to do.
        OSError: the file cannot be read.
    """
    wanted = {getattr(spec.data.columns, role) for role in spec.reads}
    for record in read_records(file, wanted):
        try:
            example = parse_example(typed(record.fields, file.format, spec), spec)
        except BadRow as problem:
            problem.line = record.line
            raise
        yield Placed(record.line, example, record.size)


def parse_example(fields: dict[str, Any], spec: TrainSpec) -> Example:
    """A row as ``spec.task`` reads it.

    Raises:
        BadRow: missing_column, invalid_text, invalid_label, invalid_tags, invalid_messages or
            invalid_preference.
    """
    columns = spec.data.columns
    if spec.task == "text-classification":
        return _classified(fields, columns, spec)
    if spec.task == "token-classification":
        return _tagged(fields, columns)
    if spec.task in SEQ2SEQ:
        return Pair(_text(fields, columns, "text"), _text(fields, columns, "target"))
    if spec.task == "embeddings":
        return Pair(_text(fields, columns, "text"), _text(fields, columns, "positive"))
    if spec.task == "fill-mask":
        return Passage(_text(fields, columns, "text"))
    if spec.preference is not None:
        return _preferred(fields, columns)
    return _generated(fields, columns, plain=spec.hyperparameters.packing)


def _classified(fields: dict[str, Any], columns: Columns, spec: TrainSpec) -> Labelled | Scored:
    text = _text(fields, columns, "text")
    label = _column(fields, columns, "label")
    where = f"column '{columns.label}'"
    if spec.problem == "regression":
        number = isinstance(label, int | float) and not isinstance(label, bool)
        if not number or not math.isfinite(label):
            raise BadRow("invalid_label", f"{where} must be a number, not {_shown(label)}")
        return Scored(text, float(label))
    if spec.problem == "multi-label":
        if not isinstance(label, list) or not all(map(_is_label, label)):
            raise BadRow(
                "invalid_label",
                f"{where} must be a list of strings or whole numbers, not {_shown(label)}",
                hint="A text without any label has an empty list.",
            )
        names = tuple(dict.fromkeys(map(str, label)))
        return Labelled(text, names, all(isinstance(name, int) for name in label))
    if not _is_label(label):
        hint = None
        if isinstance(label, list):
            hint = "For several labels a text set problem: multi-label."
        elif isinstance(label, float):
            hint = "For scores set problem: regression."
        raise BadRow(
            "invalid_label",
            f"{where} must be a string or a whole number, not {_shown(label)}",
            hint=hint,
        )
    return Labelled(text, (str(label),), isinstance(label, int))


def _tagged(fields: dict[str, Any], columns: Columns) -> Tagged:
    words, tags = _column(fields, columns, "tokens"), _column(fields, columns, "tags")
    for name, value in ((columns.tokens, words), (columns.tags, tags)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadRow(
                "invalid_tags", f"column '{name}' must be a list of strings, not {_shown(value)}"
            )
    if len(words) != len(tags):
        raise BadRow(
            "invalid_tags",
            f"column '{columns.tokens}' has {len(words)} words and column '{columns.tags}' "
            f"{len(tags)} tags",
            hint="Each word has one tag; words outside of every entity have O.",
        )
    if not words:
        raise BadRow("invalid_tags", f"column '{columns.tokens}' is an empty list")
    for name, items in ((columns.tokens, words), (columns.tags, tags)):
        blank = next((i for i, item in enumerate(items) if not item.strip()), None)
        if blank is not None:
            raise BadRow("invalid_tags", f"column '{name}'[{blank}] is empty")
        if not all(map(_is_utf8, items)):
            raise BadRow("invalid_tags", f"column '{name}' holds half of a surrogate pair")
    return Tagged(tuple(words), tuple(tags))


def _generated(
    fields: dict[str, Any], columns: Columns, *, plain: bool
) -> Chat | Completion | Passage:
    given = [c for c in (columns.messages, columns.completion, columns.prompt) if c in fields]
    if plain and given:
        raise BadRow(
            "packing_needs_text",
            f"packing puts plain texts one after another, and the row has a column '{given[0]}'",
            hint=f"Give '{columns.text}' alone, or leave hyperparameters.packing out.",
        )
    if columns.messages in fields:
        return _chat(fields[columns.messages], columns.messages)
    if columns.completion in fields or columns.prompt in fields:
        return Completion(
            _text(fields, columns, "prompt", may_be_empty=True),
            _text(fields, columns, "completion"),
        )
    if columns.text not in fields:
        raise BadRow(
            "missing_column",
            f"there is no column '{columns.messages}', '{columns.prompt}' with "
            f"'{columns.completion}', or '{columns.text}'; {_columns_of(fields)}",
            hint='Name yours with data.columns, for instance {"text": "<your column>"}.',
        )
    return Passage(_text(fields, columns, "text"))


def _preferred(fields: dict[str, Any], columns: Columns) -> Preferred:
    asked: tuple[tuple[str, str], ...] | str
    if columns.messages in fields:
        asked = _turns(fields[columns.messages], columns.messages)
        if asked[-1][0] == "assistant":
            raise BadRow(
                "invalid_messages",
                f"column '{columns.messages}' ends with a turn of the assistant, and the answers are "
                "to follow",
                hint=f"Put its last turn into '{columns.chosen}' and '{columns.rejected}' alone.",
            )
    else:
        asked = _text(fields, columns, "prompt", may_be_empty=True)
    chosen, rejected = _text(fields, columns, "chosen"), _text(fields, columns, "rejected")
    if chosen == rejected:
        raise BadRow(
            "invalid_preference",
            f"columns '{columns.chosen}' and '{columns.rejected}' are the same: neither is preferred",
            hint="Leave out pairs that are equal.",
        )
    if isinstance(asked, str):
        return Preferred(Completion(asked, chosen), Completion(asked, rejected))
    return Preferred(Chat((*asked, ("assistant", chosen))), Chat((*asked, ("assistant", rejected))))


def _chat(value: Any, column: str) -> Chat:
    turns = _turns(value, column)
    if not any(role == "assistant" and content.strip() for role, content in turns):
        raise BadRow(
            "invalid_messages",
            f"column '{column}' has no turn of the assistant: there is nothing to learn",
            hint='Give what the model shall say as {"role": "assistant", "content": …}.',
        )
    return Chat(turns)


def _turns(value: Any, column: str) -> tuple[tuple[str, str], ...]:
    def bad(why: str) -> BadRow:
        return BadRow("invalid_messages", f"column '{column}' {why}")

    if not isinstance(value, list) or not value:
        raise bad("must be a list of at least one {role, content}")
    turns: list[tuple[str, str]] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise bad(f"[{i}] must be an object with role and content, not {kind_of(turn)}")
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise bad(f"[{i}].role must be one of {', '.join(ROLES)}, not {_shown(role)}")
        if not isinstance(content, str) or not _is_utf8(content):
            raise bad(f"[{i}].content must be a string, not {_shown(content)}")
        turns.append((role, content))
    return tuple(turns)


def _text(
    fields: dict[str, Any], columns: Columns, role: str, *, may_be_empty: bool = False
) -> str:
    value = _column(fields, columns, role)
    name = getattr(columns, role)
    if not isinstance(value, str):
        raise BadRow("invalid_text", f"column '{name}' must be a string, not {_shown(value)}")
    if not _is_utf8(value):
        raise BadRow("invalid_text", f"column '{name}' holds half of a surrogate pair")
    if not may_be_empty and role in _LEARNED and not value.strip():
        raise BadRow("invalid_text", f"column '{name}' is empty: there is nothing to learn")
    return value


def _column(fields: dict[str, Any], columns: Columns, role: str) -> Any:
    name = getattr(columns, role)
    if name not in fields:
        raise BadRow(
            "missing_column",
            f"there is no column '{name[:60]}'; {_columns_of(fields)}",
            hint=f'Name your column with data.columns: {{"{role}": "<your column>"}}.',
        )
    return fields[name]


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _columns_of(fields: dict[str, Any]) -> str:
    names = ", ".join(f"'{str(name)[:40]}'" for name in list(fields)[:_SHOWN])
    more = ", …" if len(fields) > _SHOWN else ""
    return f"the row has {names or 'nothing'}{more}"


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float | bool):
        return f"{kind_of(value)} ({str(value)[:40]})" if value != "" else "an empty string"
    return kind_of(value)


def _is_utf8(text: str) -> bool:
    """False for lone surrogates, which ``\\ud800`` in JSON makes and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))
