"""Sweeps and their trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpuyard.cli.render.layout import Column, state, table
from gpuyard.cli.render.words import age
from shared.views import SweepDetail, SweepView


def sweeps(console: Console, items: Sequence[SweepView]) -> Table:
    columns = [
        Column("SWEEP", whole=True),
        Column("TRIALS", whole=True),
        Column("BEST", 80),
        Column("AGE", 70),
        Column("NAME", 60),
    ]
    rows = [(s.id, standing(s), best(s), age(s.created_at), s.name or "") for s in items]
    return table(console, columns, rows)


def standing(sweep: SweepView) -> str:
    """``3 succeeded, 1 running``."""
    return ", ".join(f"{count} {name}" for name, count in sorted(sweep.states.items()))


def best(sweep: SweepView) -> str:
    """``trial 2: accuracy 0.9125``; empty before one has succeeded."""
    if sweep.best is None:
        return ""
    return f"trial {sweep.best.number}: {sweep.metric} {sweep.best.value:.4g}"


def trials(console: Console, sweep: SweepDetail) -> Table:
    """One line a trial: what differs, how it stands, what it came to."""
    fields = list(dict.fromkeys(field for trial in sweep.trials for field in trial.parameters))
    columns = [
        Column("TRIAL", whole=True, right=True),
        *(Column(field.rpartition(".")[2].upper(), whole=True) for field in fields),
        Column("STATE", whole=True),
        Column((sweep.metric or "metric").upper(), whole=True, right=True),
        Column("JOB", 90),
    ]
    rows = []
    for trial in sweep.trials:
        chosen = sweep.best is not None and trial.number == sweep.best.number
        value = "" if trial.value is None else f"{trial.value:.4g}"
        rows.append(
            (
                trial.number,
                *(_setting(trial.parameters.get(field)) for field in fields),
                state(trial.state),
                Text(f"{value} best", style="green") if chosen else value,
                trial.job_id,
            )
        )
    return table(console, columns, rows)


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
