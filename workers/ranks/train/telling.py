"""What people hear of a training while it runs: progress, kept metrics, and lines of the log."""

from __future__ import annotations

import time

from shared.messages import Metric, Progress
from workers.ranks.train import history
from workers.ranks.train.device import Compute
from workers.ranks.train.order import BatchPlan
from workers.ranks.train.pace import Pace
from workers.ranks.train.reports import Reporter
from workers.ranks.train.state import Position
from workers.ranks.train.step import Update

_TRAIN_METRICS = 100
"""Training metrics kept over a whole training, about."""


class Telling:
    """Tells of the steps as they are done. On ranks other than 0 it comes to nothing."""

    def __init__(
        self, plan: BatchPlan, reporter: Reporter, compute: Compute, evaluate_every: int | None
    ) -> None:
        """``evaluate_every``: steps from one evaluation to the next; None: there is none."""
        self._plan = plan
        self._reporter = reporter
        self._compute = compute
        self._pace = Pace(plan, evaluate_every)
        self._kept, self._spoken = _Means(), _Means()

    def step(self, position: Position, update: Update, examples: int, seconds: float) -> None:
        """Of a step of ``examples`` that took ``seconds``; ``position`` is the place behind it, and keeps
        the step in its history."""
        plan, reporter, done = self._plan, self._reporter, position.step
        memory = self._compute.memory()
        self._pace.step(time.monotonic(), seconds)
        history.add(
            position.history,
            done,
            plan.total_steps,
            history.Sample(
                loss=update.loss,
                norm=update.norm,
                rate=update.rate,
                examples=examples,
                tokens=update.tokens,
                seconds=seconds,
                memory=memory,
                at=time.time(),
            ),
        )
        for means in (self._kept, self._spoken):
            means.add(update, examples, seconds)
        epoch, place = plan.place(done - 1)
        over = done == plan.total_steps
        reporter.progress(
            Progress(
                step=done,
                total_steps=plan.total_steps,
                epoch=epoch + (place + 1) / plan.steps_per_epoch,
                loss=None if update.skipped else update.loss,
                learning_rate=update.rate,
                examples_per_second=self._spoken.examples_per_second,
                tokens_per_second=self._spoken.tokens_per_second,
                grad_norm=None if update.skipped else update.norm,
                memory_bytes=memory,
                eta_seconds=round(self._pace.left(done), 1),
            ),
            always=over,
        )
        if update.skipped:
            reporter.say(
                f"step {done} moved no weight: gradients overflowed fp16 at a loss scale of "
                f"{update.scale:g}, which is halved"
            )
        due = over or done % max(1, plan.total_steps // _TRAIN_METRICS) == 0
        if due and self._kept.steps:
            values = {
                "loss": self._kept.loss,
                "grad_norm": self._kept.norm,
                "learning_rate": update.rate,
                "examples_per_second": self._kept.examples_per_second,
                "tokens_per_second": self._kept.tokens_per_second,
                "memory_bytes": memory,
                **({} if update.scale is None else {"loss_scale": update.scale}),
            }
            reporter.metric(Metric(split="train", step=done, values=values))
            self._kept = _Means()
        if over or place + 1 == plan.steps_per_epoch:
            reporter.say(
                f"epoch {epoch + 1} of {plan.epochs}: step {done} of {plan.total_steps}, "
                f"{self._spoken.shown_loss}, learning rate {update.rate:.2e}, "
                f"{self._spoken.examples_per_second:.1f} examples/s"
            )
            self._spoken = _Means()

    def evaluation(
        self, step: int, values: dict[str, float], examples: int, seconds: float
    ) -> None:
        """Of an evaluation on ``examples`` that took ``seconds``."""
        self._pace.evaluation(time.monotonic(), seconds)
        self._reporter.metric(Metric(split="validation", step=step, values=values))
        shown = ", ".join(f"{name.replace('_', ' ')} {_shown(v)}" for name, v in values.items())
        self._reporter.say(
            f"validation at step {step}: {shown} ({examples:,} examples in {seconds:.1f} s)"
        )


class _Means:
    """Means over the steps since something was last said or kept; losses of those that moved a weight."""

    def __init__(self) -> None:
        self.steps = 0
        """That moved a weight."""
        self._loss = self._norm = self._seconds = 0.0
        self._examples = 0
        self._tokens = 0.0

    def add(self, update: Update, examples: int, seconds: float) -> None:
        if not update.skipped:
            self.steps += 1
            self._loss += update.loss
            self._norm += update.norm
        self._examples += examples
        self._tokens += update.tokens
        self._seconds += seconds

    @property
    def loss(self) -> float:
        return self._loss / self.steps

    @property
    def shown_loss(self) -> str:
        return f"loss {self.loss:.4f}" if self.steps else "no step moved a weight"

    @property
    def norm(self) -> float:
        return self._norm / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(1e-9, self._seconds)

    @property
    def examples_per_second(self) -> float:
        return self._examples / max(1e-9, self._seconds)


def _shown(value: float) -> str:
    """Counts are whole numbers."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
