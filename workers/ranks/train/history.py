"""The course of a training, thinned so that every checkpoint can carry it.

It lies in ``Position``, so it rewinds with it: what an attempt did beyond the checkpoint that the next one
goes on from is forgotten, and a training that was resumed has the history of one that never was (but for
what clocks and memory say).

A row stands for some steps in a row, as sums. The last one is open until its share of the steps is done,
also across a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from workers.writeup.facts import Point

POINTS = 500
"""Rows of a whole training, at most."""
_DIGITS = 7
"""Of a sum that is closed: a row is some 70 bytes of JSON."""

Row = list[float]
"""[step, steps that have a loss, sum of losses, sum of norms, rate, examples, tokens, seconds, memory,
time]: the rate and the time of the last step, the most memory of all."""
_STEP, _COUNTED, _LOSS, _NORM, _RATE, _EXAMPLES, _TOKENS, _SECONDS, _MEMORY, _AT = range(10)
_SUMS = (_LOSS, _NORM, _TOKENS, _SECONDS)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one step came to."""

    loss: float
    norm: float
    rate: float
    examples: int
    tokens: float
    seconds: float
    memory: int
    """Bytes."""
    at: float
    """Seconds since 1970."""


def add(rows: list[Row], step: int, total_steps: int, sample: Sample) -> None:
    """Count in the step after which ``step`` of ``total_steps`` are done."""
    every = math.ceil(total_steps / POINTS)
    if not rows or rows[-1][_STEP] % every == 0:
        rows.append([0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, 0.0])
    row = rows[-1]
    if math.isfinite(sample.loss) and math.isfinite(sample.norm):
        row[_COUNTED] += 1
        row[_LOSS] += sample.loss
        row[_NORM] += sample.norm
    row[_EXAMPLES] += sample.examples
    row[_TOKENS] += sample.tokens
    row[_SECONDS] += sample.seconds
    row[_MEMORY] = max(row[_MEMORY], sample.memory)
    row[_STEP], row[_RATE], row[_AT] = step, sample.rate, round(sample.at, 2)
    if step % every == 0:
        for column in _SUMS:
            row[column] = _rounded(row[column])


def points(rows: Sequence[Row]) -> list[Point]:
    """The rows as people read them."""
    found, spent = [], 0.0
    for row in rows:
        counted, seconds = row[_COUNTED], max(1e-9, row[_SECONDS])
        spent += row[_SECONDS]
        found.append(
            Point(
                step=int(row[_STEP]),
                loss=row[_LOSS] / counted if counted else None,
                grad_norm=row[_NORM] / counted if counted else None,
                learning_rate=row[_RATE],
                examples_per_second=row[_EXAMPLES] / seconds,
                tokens_per_second=row[_TOKENS] / seconds,
                memory_bytes=int(row[_MEMORY]),
                seconds=spent,
                at=row[_AT],
            )
        )
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
