"""Rows of several prompts: their parts are computed among other rows, in any order and pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.rows import result
from workers.ranks.engine.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row, and what the model made of it."""

    prompt: Prompt
    output: dict[str, Any]


@dataclass(slots=True)
class _Row:
    pieces: dict[int, Piece] = field(default_factory=dict)
    done: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    error: dict[str, Any] | None = None
    """Of the first part that went wrong: the row's."""


class Parts:
    """What is computed of rows that are not whole yet.

    Args:
        unite: the output of a row out of its pieces, in order.
    """

    def __init__(self, unite: Callable[[Sequence[Piece]], dict[str, Any]]) -> None:
        self._unite = unite
        self._rows: dict[tuple[str, int], _Row] = {}

    def file(self, prompt: Prompt, found: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a prompt; that of its row, once it has all parts. A row that is one prompt has
        it at once."""
        if prompt.parts is None:
            return found
        key = (prompt.owner, prompt.row)
        row = self._rows.setdefault(key, _Row())
        row.done += 1
        if found["error"] is not None:
            row.error = row.error or found
        else:
            row.pieces[prompt.part] = Piece(prompt, found["output"])
            row.input_tokens += found["usage"]["input_tokens"]
            row.output_tokens += found["usage"]["output_tokens"]
        if row.done < prompt.parts:
            return None
        del self._rows[key]
        if row.error is not None:
            return row.error
        return result(
            prompt.row,
            id=prompt.id,
            output=self._unite([row.pieces[part] for part in range(prompt.parts)]),
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
        )

    def leave(self, owner: str) -> None:
        """An attempt is over: its rows are not wanted any more."""
        self._rows = {key: row for key, row in self._rows.items() if key[0] != owner}
