"""The seam between attempts and what computes their rows.

Attempts that use one model in one way share one computation, so that rows of different jobs share forward
passes. What a job is given of it is fair: see :class:`workers.ranks.engine.turns.Turns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.ranks.engine.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Answered:
    """The result of a row, and whose it is."""

    owner: str
    result: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step brought: results of finished rows, and for each owner how many tokens were computed
    (generated ones where text is written, input tokens elsewhere)."""

    results: list[Answered]
    tokens: dict[str, int]


class Computation(Protocol):
    """Rows go in at any time, in any number; results come out as they are finished.

    ``step`` is the unit between two looks at the channel: short, so that a cancel is quick. Running
    out of memory is dealt with inside; a row that does not fit alone gets an error.
    """

    def join(self, owner: str, rows: int) -> None:
        """An attempt begins, and asks for ``rows`` rows computed together at most."""

    def leave(self, owner: str) -> None:
        """An attempt is over: whatever is left of its rows is not wanted any more."""

    @property
    def busy(self) -> bool:
        """Rows are inside."""

    def wants_rows(self, owner: str) -> bool:
        """More rows of this owner now would make it faster."""

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Rows of owners that have joined."""

    def step(self) -> Step: ...
