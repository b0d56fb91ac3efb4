"""The training loop: the steps, and what is due between them.

What is due comes in one order: evaluate, decide whether that was the last, then checkpoint. So a
checkpoint knows of the evaluation at its step, and none is made of a training that has ended.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shared.messages import CheckpointRef
from shared.specs import TrainSpec
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import Diverged, Preempted
from workers.ranks.train.gang import Gang
from workers.ranks.train.health.health import Health
from workers.ranks.train.order import BatchPlan, Indices, epoch_order
from workers.ranks.train.parallel import Parallel
from workers.ranks.train.reports import Reporter
from workers.ranks.train.saving import Saver, best_model
from workers.ranks.train.schedule import Schedule
from workers.ranks.train.state import Fingerprint, Position, restore_best
from workers.ranks.train.step import Stepper
from workers.ranks.train.stopping import is_over, require_metric
from workers.ranks.train.tasks import Task
from workers.ranks.train.tasks.base import Evaluation, Objective
from workers.ranks.train.telling import Telling


class Trainer:
    """One rank's training: ``run`` takes it from ``position`` to the last step."""

    def __init__(
        self,
        *,
        spec: TrainSpec,
        task: Task,
        objective: Objective,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        plan: BatchPlan,
        training: Examples,
        validation: Examples | None,
        compute: Compute,
        gang: Gang,
        parallel: Parallel,
        reporter: Reporter,
        checkpoints: Path,
        fingerprint: Fingerprint,
        best: CheckpointRef | None,
        device_mtbf: float,
        evaluation_batch: int,
        health: Health,
    ) -> None:
        """``best`` and ``device_mtbf`` are the ``Saver``'s. ``evaluation_batch``: examples that a rank
        judges at once."""
        self._spec = spec
        self._options = spec.hyperparameters
        self._task = task
        self._model = model
        self._plan = plan
        self._training = training
        self._validation = validation
        self._compute = compute
        self._gang = gang
        self._parallel = parallel
        self._reporter = reporter
        self._evaluation_batch = evaluation_batch
        self._health = health
        self._first_step = 0
        self.stopped_early = False
        self._stepper = Stepper(
            options=self._options,
            objective=objective,
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            plan=plan,
            training=training,
            compute=compute,
            gang=gang,
            parallel=parallel,
        )
        self._saver = Saver(
            rules=spec.checkpoint,
            best_model=lambda place: best_model(task, place),
            model=model,
            optimizer=optimizer,
            fingerprint=fingerprint,
            compute=compute,
            gang=gang,
            reporter=reporter,
            folder=checkpoints,
            best=best,
            device_mtbf=device_mtbf,
        )
        every = None if validation is None else self._evaluate_every
        self._telling = Telling(plan, reporter, compute, every)
        self._order: tuple[int, Indices] | None = None

    def run(self, position: Position) -> Evaluation | None:
        """Train to the end; returns the evaluation of the final model, where there is validation.

        ``position`` moves on with the training. With early stopping the model is the best one that
        was evaluated, whenever training ended.

        Raises:
            Diverged: the loss is no longer finite (user_error).
            TrainingFailed: early stopping names a metric that there is none of (user_error).
            Preempted: a rank's device was wanted back; the checkpoint of the step is durable.
            Stopped: the worker ordered it, or is gone; nothing further is written.
        """
        total = self._plan.total_steps
        began = time.monotonic()
        before, self._first_step = position.seconds, position.step
        self._health.after_checkpoint(position.step)
        evaluation: Evaluation | None = None
        while position.step < total:
            self._reporter.check_orders()
            step_began = time.monotonic()
            batch = self._batch(position.step)
            wanted_back = float(self._has_to_leave(position, began))
            signals = [wanted_back, self._saver.wish(), float(self._saver.written_step or 0)]
            try:
                update = self._stepper.step(position.step, batch, signals, position.loss_scale)
            except Diverged as end:
                raise self._health.explain(end) from None
            _, wishes, written = update.signals
            self._health.after_checkpoint(int(written))
            position.step += 1
            now = time.monotonic()
            position.seconds = before + now - began
            self._telling.step(position, update, len(batch), now - step_began)
            self._saver.after_step(now - step_began, wishes)
            whole = len(batch) == self._plan.global_batch
            self._health.after_step(position.step, update, whole=whole, seconds=now - step_began)
            if self._evaluation_is_due(position.step):
                evaluation = self._evaluate(position)
                if self._ends_early(position):
                    break
            # The last step needs no checkpoint, as the model itself follows.
            if position.step < total and self._saver.due(position):
                self._saver.save(position)
            if position.step < total and update.signals[0] > 0:
                self._saver.save_and_wait(position)
                raise Preempted(f"left at step {position.step} of {total}")
        self._saver.close()
        return self._deliver_best(position, evaluation)

    def _has_to_leave(self, position: Position, began: float) -> bool:
        """Whether this rank's device is wanted back before the training can be over."""
        if self._reporter.asked_back is None:
            return False
        done = position.step - self._first_step
        pace = (time.monotonic() - began) / done if done else math.inf
        left = self._plan.total_steps - position.step
        # Twice: the model has to be evaluated and written as well.
        return 2 * left * pace > self._reporter.seconds_left

    def _batch(self, step: int) -> Indices:
        epoch, place = self._plan.place(step)
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(
                self._training.lengths, self._plan.global_batch, self._options.seed, epoch
            )
            self._order = (epoch, order)
        start = place * self._plan.global_batch
        return self._order[1][start : start + self._plan.global_batch]

    @property
    def _evaluate_every(self) -> int:
        return self._options.eval_every_steps or self._plan.steps_per_epoch

    def _evaluation_is_due(self, step: int) -> bool:
        return step % self._evaluate_every == 0 or step == self._plan.total_steps

    def _evaluate(self, position: Position) -> Evaluation | None:
        if self._validation is None:
            return None
        began = time.monotonic()
        evaluation = self._judge(self._validation)
        values = evaluation.values
        if self._spec.early_stopping is not None:
            require_metric(self._task.judged_by, values)
        position.evaluations.append({"step": position.step, **values})
        seconds = time.monotonic() - began
        self._telling.evaluation(position.step, values, len(self._validation), seconds)
        return evaluation

    def _judge(self, validation: Examples) -> Evaluation:
        with self._parallel.evaluating(self._model):
            return self._task.evaluate(
                self._model,
                validation,
                batch_size=self._evaluation_batch,
                compute=self._compute,
                gang=self._gang,
            )

    def _ends_early(self, position: Position) -> bool:
        # Every rank has the same evaluations, and so decides the same.
        rule, task = self._spec.early_stopping, self._task
        if rule is None or position.step == self._plan.total_steps:
            return False
        entries = position.evaluations
        self.stopped_early = is_over(rule, entries, task.judged_by, task.is_better)
        if self.stopped_early:
            self._reporter.say(
                f"training ends at step {position.step} of {self._plan.total_steps}: "
                f"{rule.patience} evaluation(s) in a row without a better {task.judged_by}"
            )
        return self.stopped_early

    def _deliver_best(self, position: Position, evaluation: Evaluation | None) -> Evaluation | None:
        """With early stopping, go back to the best model; its evaluation, or else the last one's."""
        best = best_model(self._task, position)
        if best is None or best.step == position.step or self._validation is None:
            return evaluation
        restore_best(self._model, self._saver.best, self._gang)
        self._reporter.say(
            f"the best model is delivered: step {best.step}, {best.metric} {best.value:.4f}"
        )
        # Judged once more, for the details that only an evaluation has.
        return self._judge(self._validation)
