"""What is known of a training when it ends: all that is written about it is made of this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from shared.messages import EndedAttempt

Evaluations = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Point:
    """Means over the steps up to ``step`` since the point before."""

    step: int
    loss: float | None
    """None where no step had a finite one."""
    grad_norm: float | None
    learning_rate: float
    examples_per_second: float
    tokens_per_second: float
    memory_bytes: int
    seconds: float
    """Spent in steps since the training began."""
    at: float
    """When the step was done, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The examples of one split."""

    split: str
    source: str
    """As the spec names it."""
    examples: int
    sha256: str
    """Of the examples as the model reads them: tokens, and what is learned of them."""
    median_tokens: int
    longest_tokens: int
    cut: int
    """Examples that were longer than the model reads."""


@dataclass(frozen=True, slots=True)
class Part:
    """An attempt that the delivered model is made of: from ``step`` on, on ``ranks`` devices."""

    number: int
    step: int
    ranks: int
    device: str
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """``evaluations`` have a ``step`` each and are in its order; ``details`` are the last one's."""

    job_id: str
    spec: Mapping[str, Any]
    parameters: int
    trained_parameters: int
    rows: Sequence[Rows]
    labels: Sequence[str]
    batch: str
    """The arithmetic of the global batch, in words."""
    precision: str
    device_kind: str
    """cpu or cuda."""
    steps: int
    total_steps: int
    steps_per_epoch: int
    seconds: float
    stopped_early: bool
    judged_by: str
    goal: str
    """Of the metric that the model is judged by: maximize or minimize."""
    values: Mapping[str, float]
    """What the delivered model was measured at; empty without validation data."""
    details: Mapping[str, Any]
    points: Sequence[Point]
    evaluations: Evaluations
    parts: Sequence[Part]
    ended: Sequence[EndedAttempt]
    versions: Mapping[str, str]
    finished_at: datetime
    peak_memory_bytes: int | None = None
    samples: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def task(self) -> str:
        return str(self.spec["task"])

    @property
    def base(self) -> str:
        """What the training began with, as the spec says it."""
        architecture = self.spec.get("architecture")
        return f"new {architecture['type']}" if architecture else str(self.spec.get("model") or "")

    @property
    def title(self) -> str:
        return str(
            self.spec.get("name") or self.spec.get("publish") or f"{self.task} of {self.base}"
        )

    def epoch(self, step: float) -> float:
        return step / self.steps_per_epoch

    @property
    def extent(self) -> str:
        """How far it went, in epochs, in words."""
        epochs = self.epoch(self.steps)
        return f"{epochs:.4g} epoch" + ("" if epochs == 1 else "s")

    @property
    def best_step(self) -> int | None:
        """Of the evaluation with the best value of ``judged_by``, the first of several."""
        known = [e for e in self.evaluations if e.get(self.judged_by) is not None]
        if not known:
            return None
        pick = max if self.goal == "maximize" else min
        return int(pick(known, key=lambda entry: entry[self.judged_by])["step"])
