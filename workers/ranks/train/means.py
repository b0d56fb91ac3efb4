"""Means over some steps in a row."""

from __future__ import annotations

from dataclasses import dataclass

from workers.ranks.train.step import Update


@dataclass(slots=True)
class Means:
    """Sums over the steps since something was last told; losses and norms of those that moved a weight."""

    steps: int = 0
    """That moved a weight."""
    losses: float = 0.0
    norms: float = 0.0
    seconds: float = 0.0
    examples: int = 0
    tokens: float = 0.0

    def add(self, update: Update, examples: int, seconds: float) -> None:
        """Count in a step of ``examples`` that took ``seconds``."""
        if not update.skipped:
            self.steps += 1
            self.losses += update.loss
            self.norms += update.norm
        self.examples += examples
        self.tokens += update.tokens
        self.seconds += seconds

    @property
    def loss(self) -> float:
        return self.losses / self.steps

    @property
    def shown_loss(self) -> str:
        return f"loss {self.loss:.4f}" if self.steps else "no step moved a weight"

    @property
    def norm(self) -> float:
        return self.norms / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, self.seconds)

    @property
    def examples_per_second(self) -> float:
        return self.examples / max(1e-9, self.seconds)
