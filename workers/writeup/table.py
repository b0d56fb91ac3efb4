"""``metrics.csv``: one value a line, so that it reads the same for every task and any number of metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from workers.writeup.facts import Facts

COLUMNS = ("split", "step", "epoch", "metric", "value")
TRAINING = (
    "loss",
    "grad_norm",
    "learning_rate",
    "examples_per_second",
    "tokens_per_second",
    "memory_bytes",
    "seconds",
)
"""Metrics of the split ``train``: fields of a ``Point``."""

Value = tuple[str, int, str, float]
"""(split, step, metric, value)"""


def values(facts: Facts) -> Iterator[Value]:
    """All that was measured, training first, each split in the order of steps."""
    for point in facts.points:
        for name in TRAINING:
            value = getattr(point, name)
            if value is not None:
                yield "train", point.step, name, value
    for entry in facts.evaluations:
        for name, value in entry.items():
            if name != "step":
                yield "validation", int(entry["step"]), name, value


def metrics_csv(facts: Facts) -> str:
    """With a header; numbers as Python writes them, so that none loses a digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for split, step, name, value in values(facts):
        writer.writerow([split, step, round(facts.epoch(step), 6), name, value])
    return text.getvalue()
