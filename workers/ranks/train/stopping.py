"""Early stopping as a pure function of the evaluations so far.

Nothing here has state: what counts is in ``Position.evaluations``, which every rank holds alike and every
checkpoint carries. So a decision that is made again after a crash is the decision made before.

The best model itself is kept on disk, as a checkpoint like any other. Host memory would hold the weights
once more all the time, and would lose them with the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shared.lifecycle import FailureClass
from shared.specs import EarlyStopping
from workers.ranks.train.failures import TrainingFailed

IsBetter = Callable[[float, float], bool]
"""(new, old): whether the first value of a metric is better than the second."""


@dataclass(frozen=True, slots=True)
class Best:
    """The best of some evaluations."""

    metric: str
    step: int
    value: float


def best_of(
    evaluations: Sequence[Mapping[str, float]], metric: str, is_better: IsBetter
) -> Best | None:
    """The first of those with the best value; one that is no number is never the best."""
    best: Best | None = None
    for entry in evaluations:
        value = entry[metric]
        if not math.isnan(value) and (best is None or is_better(value, best.value)):
            best = Best(metric, int(entry["step"]), value)
    return best


def without_improvement(
    evaluations: Sequence[Mapping[str, float]],
    metric: str,
    is_better: IsBetter,
    min_delta: float,
) -> int:
    """Evaluations in a row, up to the last, that were not better by ``min_delta``.

    Each is held against the last one that was, so that many small improvements count together: this is
    another question than which of them is the best.
    """
    mark: float | None = None
    waited = 0
    for entry in evaluations:
        value = entry[metric]
        far_enough = mark is None or abs(value - mark) > min_delta
        if not math.isnan(value) and far_enough and (mark is None or is_better(value, mark)):
            mark, waited = value, 0
        else:
            waited += 1
    return waited


def is_over(
    rule: EarlyStopping,
    evaluations: Sequence[Mapping[str, float]],
    metric: str,
    is_better: IsBetter,
) -> bool:
    """Whether training ends with the last of these evaluations."""
    waited = without_improvement(evaluations, metric, is_better, rule.min_delta)
    return waited >= rule.patience


def require_metric(metric: str, values: Mapping[str, float]) -> None:
    """Raises TrainingFailed where an evaluation does not measure ``metric``."""
    if metric not in values:
        raise TrainingFailed(
            FailureClass.USER_ERROR,
            "unknown_metric",
            f"early_stopping.metric '{metric}' is not measured; what is: {', '.join(values)}",
            "Name one of those, or leave it out for the task's own.",
        )
