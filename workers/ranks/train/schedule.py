"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.specs import Hyperparameters


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up from 0, then the named decay to 0 at ``total_steps`` ('constant' stays)."""

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        """The learning rate of the update that step ``step`` (from 0) makes.

        The first step of a warm-up already learns a little, and the last step of a decay still
        does: no update is wasted on a rate of 0.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        done = min(1.0, max(0.0, done))
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.peak * (1.0 - done)


def make_schedule(options: Hyperparameters, total_steps: int) -> Schedule:
    """Raises ValueError where all of training would be warm-up; the message is for the user."""
    if options.warmup_steps is not None:
        warmup = options.warmup_steps
    else:
        warmup = int((options.warmup_ratio or 0.0) * total_steps)
    if warmup >= total_steps and warmup > 0:
        raise ValueError(f"warmup_steps {warmup} is not below the {total_steps} steps of training")
    return Schedule(
        kind=options.schedule,
        peak=options.learning_rate,
        warmup_steps=warmup,
        total_steps=total_steps,
    )
