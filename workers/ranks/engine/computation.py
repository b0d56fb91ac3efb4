"""The seam between an attempt and what computes its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from workers.ranks.engine.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Step:
    """What one step brought: results of finished rows, and how many tokens were computed
    (generated ones where text is written, input tokens elsewhere)."""

    results: list[dict[str, Any]]
    tokens: int


class Computation(Protocol):
    """Rows go in at any time, in any number; results come out as they are finished.

    ``step`` is the unit between two looks at the channel: short, so that a cancel is quick. Running
    out of memory is dealt with inside; a row that does not fit alone gets an error.
    """

    @property
    def busy(self) -> bool:
        """Rows are inside."""

    @property
    def wants_rows(self) -> bool:
        """More rows now would make it faster."""

    def add(self, prompts: Sequence[Prompt]) -> None: ...

    def step(self) -> Step: ...
