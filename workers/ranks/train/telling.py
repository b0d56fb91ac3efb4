"""What people hear of a training while it runs: progress, kept metrics, and lines of the log."""

from __future__ import annotations

import time

from shared.messages import Metric, Progress
from workers.ranks.train import history
from workers.ranks.train.device import Compute
from workers.ranks.train.means import Means
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
        self._spoken = Means()

    def step(self, position: Position, update: Update, examples: int, seconds: float) -> None:
        """Of a step of ``examples`` that took ``seconds``; ``position`` is the place behind it, and keeps
        the step in its history and its means."""
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
        for means in (position.kept, self._spoken):
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
        if due and position.kept.steps:
            values = {
                "loss": position.kept.loss,
                "grad_norm": position.kept.norm,
                "learning_rate": update.rate,
                "examples_per_second": position.kept.examples_per_second,
                "tokens_per_second": position.kept.tokens_per_second,
                "memory_bytes": memory,
                **({} if update.scale is None else {"loss_scale": update.scale}),
            }
            reporter.metric(Metric(split="train", step=done, values=values))
            position.kept = Means()
        if over or place + 1 == plan.steps_per_epoch:
            reporter.say(
                f"epoch {epoch + 1} of {plan.epochs}: step {done} of {plan.total_steps}, "
                f"{self._spoken.shown_loss}, learning rate {update.rate:.2e}, "
                f"{self._spoken.examples_per_second:.1f} examples/s"
            )
            self._spoken = Means()

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


def _shown(value: float) -> str:
    """Counts are whole numbers."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
