"""What the trials came to: told at the end of the test run as the table of docs/training.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.real.trial import Trial

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
    trial: Trial
    judged_by: str
    """A metric of the evaluations while training."""
    measure: str
    """What is measured of the batch jobs' answers, in the three figures that follow."""
    untrained: float
    trained: float
    baseline: str = ""
    """What needs no model, such as always the commonest answer."""

    @property
    def cells(self) -> tuple[str, ...]:
        before, after = (m[self.judged_by] for m in (self.trial.before, self.trial.metrics))
        return (
            *(self.task, self.data, f"{self.rows:,}", f"{self.trial.seconds:.0f}"),
            f"{self.judged_by.replace('_', ' ')} {_short(before)} → {_short(after)}",
            *(self.measure, _short(self.untrained), self.baseline, f"**{_short(self.trained)}**"),
        )


@dataclass
class Results:
    lines: list[Line] = field(default_factory=list)

    def markdown(self) -> str:
        rows = [HEADS, tuple("---" for _ in HEADS), *(line.cells for line in self.lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
