"""What the trials came to: told at the end of the test run as the table of docs/training.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.real.scores import Score

HEADS = (
    *("task", "data", "rows", "seconds", "validation, before → after"),
    *("batch job on held-out rows", "untrained", "baseline", "trained"),
)


@dataclass(frozen=True, slots=True)
class Line:
    task: str
    data: str
    rows: int
    """To train on."""
    seconds: float
    judged_by: str
    """A metric of the evaluations while training, as two figures: before it and after."""
    before: float
    after: float
    score: Score
    """Of the batch jobs' answers."""

    @property
    def cells(self) -> tuple[str, ...]:
        score, base = self.score, self.score.baseline
        return (
            *(self.task, self.data, f"{self.rows:,}", f"{self.seconds:.0f}"),
            f"{self.judged_by.replace('_', ' ')} {_short(self.before)} → {_short(self.after)}",
            *(score.name, _short(score.untrained)),
            f"{_short(base.value)} {base.what}" if base is not None else "",
            f"**{_short(score.trained)}**",
        )


def markdown(lines: Sequence[Line]) -> str:
    rows = [HEADS, tuple("---" for _ in HEADS), *(line.cells for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
