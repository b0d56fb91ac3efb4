"""TensorBoard's event files, by tensorboardX: TensorBoard itself brings a web server along."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

from tensorboardX import SummaryWriter

from workers.writeup.facts import Facts
from workers.writeup.table import values


def write_events(folder: Path, facts: Facts) -> None:
    """One event file in ``folder``: scalars ``train/loss``, ``validation/accuracy`` and so on by step, at
    the time at which they were measured."""
    steps = [point.step for point in facts.points]
    with SummaryWriter(str(folder)) as writer:
        for split, step, name, value in values(facts):
            # An evaluation may lie between two points.
            place = min(bisect_left(steps, step), len(steps) - 1)
            at = facts.points[place].at if steps else None
            writer.add_scalar(f"{split}/{name}", value, step, walltime=at)
