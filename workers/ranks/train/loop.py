"""The training loop: forward, backward, agree, update, and what is due between the steps.

What is due comes in one order: evaluate, decide whether that was the last, then checkpoint. So a
checkpoint knows of the evaluation at its step, and none is made of a training that has ended.

Randomness is reseeded for every micro-batch from (seed, step, rank, micro-batch), so a step that is
computed again after a crash is bitwise the step that was computed before, on the same world size.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef, CheckpointWritten, Metric, Progress
from shared.specs import TrainSpec
from workers.ranks.checkpoint import CheckpointWriter, Written
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import Preempted, TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.optimizer import add_l1, regularised
from workers.ranks.train.order import BatchPlan, Indices, derive, epoch_order, micro_batches
from workers.ranks.train.parallel import parallelise, warm_up_batch
from workers.ranks.train.reports import Reporter
from workers.ranks.train.schedule import Schedule
from workers.ranks.train.state import Fingerprint, Position, describe, restore_best, snapshot
from workers.ranks.train.stopping import Best, best_of, is_over, require_metric
from workers.ranks.train.tasks import Task
from workers.ranks.train.tasks.base import Evaluation, Objective

_TRAIN_METRICS = 100
"""Training metrics kept over a whole training, about."""


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
        reporter: Reporter,
        checkpoints: Path,
        fingerprint: Fingerprint,
        best: CheckpointRef | None,
    ) -> None:
        """``best``: where rank 0 finds the best model so far, if another attempt has made it."""
        self._spec = spec
        self._options = spec.hyperparameters
        self._task = task
        self._objective = objective
        self._model = model
        self._optimizer = optimizer
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._regularised = regularised(model)
        self._schedule = schedule
        self._plan = plan
        self._training = training
        self._validation = validation
        self._compute = compute
        self._gang = gang
        self._reporter = reporter
        self._fingerprint = fingerprint
        self._writer = CheckpointWriter(checkpoints, self._checkpoint_written)
        self._blocked = 0.0
        self._first_step = 0
        self._saved_step: int | None = None
        self._best_step: int | None = None
        self._best = best
        self.stopped_early = False
        warm_up = warm_up_batch(objective, training, plan, compute)
        self._wrapped = parallelise(objective, model, warm_up, compute, gang)
        self._order: tuple[int, Indices] | None = None

    def run(self, position: Position) -> Evaluation | None:
        """Train to the end; returns the evaluation of the final model, where there is validation.

        ``position`` moves on with the training. With early stopping the model is the best one that
        was evaluated, whenever training ended.

        Raises:
            TrainingFailed: the loss is no longer finite, or early stopping names a metric that there is
                none of (user_error).
            Preempted: a rank's device was wanted back; the checkpoint of the step is durable.
            Stopped: the worker ordered it, or is gone; nothing further is written.
        """
        plan, reporter = self._plan, self._reporter
        began = saved = time.monotonic()
        before, self._first_step = position.seconds, position.step
        evaluation: Evaluation | None = None
        kept, spoken = _Means(), _Means()
        while position.step < plan.total_steps:
            reporter.check_orders()
            step_began = time.monotonic()
            epoch, place = plan.place(position.step)
            batch = self._batch(epoch, place)
            loss, norm, tokens, leave = self._step(position, batch, began)
            position.step += 1
            now = time.monotonic()
            position.seconds = before + now - began
            rate = self._schedule.rate(position.step - 1)
            for means in (kept, spoken):
                means.add(loss, norm, len(batch), tokens, now - step_began)
            reporter.progress(
                Progress(
                    step=position.step,
                    total_steps=plan.total_steps,
                    epoch=epoch + (place + 1) / plan.steps_per_epoch,
                    loss=loss,
                    learning_rate=rate,
                    examples_per_second=spoken.examples_per_second,
                    tokens_per_second=spoken.tokens_per_second,
                ),
                always=position.step == plan.total_steps,
            )
            if self._metric_is_due(position.step):
                values = {"loss": kept.loss, "grad_norm": kept.norm, "learning_rate": rate}
                reporter.metric(Metric(split="train", step=position.step, values=values))
                kept = _Means()
            if place + 1 == plan.steps_per_epoch or position.step == plan.total_steps:
                reporter.say(
                    f"epoch {epoch + 1} of {plan.epochs}: step {position.step} of "
                    f"{plan.total_steps}, loss {spoken.loss:.4f}, learning rate {rate:.2e}, "
                    f"{spoken.examples_per_second:.1f} examples/s"
                )
                spoken = _Means()
            if self._evaluation_is_due(position.step):
                evaluation = self._evaluate(position)
                if self._ends_early(position):
                    break
            if self._checkpoint_is_due(position, saved):
                self._save(position)
                saved = time.monotonic()
            if leave and position.step < plan.total_steps:
                self._leave(position)
        self._writer.close()
        return self._deliver_best(position, evaluation)

    def _step(
        self, position: Position, indices: Indices, began: float
    ) -> tuple[float, float, float, bool]:
        """One update from one global batch: (its mean loss, the gradient's norm, its tokens, whether
        a rank's device is wanted back and all have to leave).

        Every rank computes its micro-batches and scales each loss so that DDP's mean over the ranks
        is the mean over the weights of the global batch (its examples, or its predicted tokens), also
        where that is a partial one.
        """
        step = position.step
        weight = max(1, int(self._training.weights[indices].sum()))
        masks = derive(self._options.seed, "masks", step)
        loss = torch.zeros((), device=self._compute.device)
        tokens = 0
        parts = micro_batches(indices, self._plan, self._gang.rank)
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            # A rank with nothing left to do of a partial batch computes some example for nothing:
            # the others wait for it in this step's all-reduce.
            chosen = part if len(part) else indices[:1]
            batch = self._objective.batch(self._training, chosen, masks).to(self._compute.device)
            self._compute.seed(derive(self._options.seed, "dropout", step, self._gang.rank, number))
            with nullcontext() if last else self._without_sync():
                total = self._objective.loss(self._wrapped, batch, self._compute) * (len(part) > 0)
                scaled = total * (self._gang.world_size / weight)
                scaled.backward()  # type: ignore[no-untyped-call]
            loss += total.detach()
            tokens += batch.tokens if len(part) else 0
        if self._options.l1:
            # A rank's gradients are those of the gang by now, and so is what is added to them.
            add_l1(self._regularised, self._options.l1)
        limit = self._options.max_grad_norm
        # The gradients are all-reduced, so their norm, and what is decided by it, is every rank's.
        norm = float(nn.utils.clip_grad_norm_(self._trained, math.inf if limit is None else limit))
        # Together, so that all ranks hear of it after the same step.
        wanted_back = float(self._has_to_leave(position, began))
        loss_sum, token_sum, leaving = self._gang.sum([float(loss), tokens, wanted_back])
        mean = loss_sum / weight
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise _diverged(step, mean, norm)
        rate = self._schedule.rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mean, norm, token_sum, leaving > 0

    def _has_to_leave(self, position: Position, began: float) -> bool:
        """Whether this rank's device is wanted back before the training can be over."""
        if self._reporter.asked_back is None:
            return False
        done = position.step - self._first_step
        pace = (time.monotonic() - began) / done if done else math.inf
        left = self._plan.total_steps - position.step
        # Twice: the model has to be evaluated and written as well.
        return 2 * left * pace > self._reporter.seconds_left

    def _leave(self, position: Position) -> None:
        """Make what is done durable, and leave.

        Raises:
            Preempted: always.
        """
        if self._gang.rank == 0:
            if self._saved_step != position.step:
                self._save(position)
            self._writer.close()
        raise Preempted(f"left at step {position.step} of {self._plan.total_steps}")

    def _batch(self, epoch: int, place: int) -> Indices:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(
                self._training.lengths, self._plan.global_batch, self._options.seed, epoch
            )
            self._order = (epoch, order)
        start = place * self._plan.global_batch
        return self._order[1][start : start + self._plan.global_batch]

    def _without_sync(self) -> AbstractContextManager[None]:
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return nullcontext()

    def _metric_is_due(self, step: int) -> bool:
        every = max(1, self._plan.total_steps // _TRAIN_METRICS)
        return step % every == 0 or step == self._plan.total_steps

    def _evaluation_is_due(self, step: int) -> bool:
        every = self._options.eval_every_steps or self._plan.steps_per_epoch
        return step % every == 0 or step == self._plan.total_steps

    def _evaluate(self, position: Position) -> Evaluation | None:
        if self._validation is None:
            return None
        began = time.monotonic()
        evaluation = self._judge(self._validation)
        values = evaluation.values
        if self._spec.early_stopping is not None:
            require_metric(self._task.judged_by, values)
        position.evaluations.append({"step": position.step, **values})
        self._reporter.metric(Metric(split="validation", step=position.step, values=values))
        shown = ", ".join(f"{name.replace('_', ' ')} {_shown(v)}" for name, v in values.items())
        self._reporter.say(
            f"validation at step {position.step}: {shown} "
            f"({len(self._validation):,} examples in {time.monotonic() - began:.1f} s)"
        )
        return evaluation

    def _judge(self, validation: Examples) -> Evaluation:
        return self._task.evaluate(
            self._model,
            validation,
            batch_size=max(self._plan.micro_batch, 16),
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
        restore_best(self._model, self._best, self._gang)
        self._reporter.say(
            f"the best model is delivered: step {best.step}, {best.metric} {best.value:.4f}"
        )
        # Judged once more, for the details that only an evaluation has.
        return self._judge(self._validation)

    def _checkpoint_is_due(self, position: Position, saved: float) -> bool:
        step = position.step
        # Every rank holds the same state, so a checkpoint is no collective: rank 0 alone decides by
        # its clock and alone writes. The last step needs none, as the model itself follows.
        if self._gang.rank != 0 or step == self._plan.total_steps:
            return False
        if position.evaluations and position.evaluations[-1]["step"] == step:
            best = best_model(self._task, position)
            if best is not None and best.step == step:
                return True
        rules = self._spec.checkpoint
        by_step = rules.every_steps is not None and step % rules.every_steps == 0
        by_time = (
            rules.every_seconds is not None and time.monotonic() - saved >= rules.every_seconds
        )
        return by_step or by_time

    def _save(self, position: Position) -> None:
        began = time.monotonic()
        # Before the copy, so that host memory holds one checkpoint at a time.
        self._writer.close()
        tensors = snapshot(self._model, self._optimizer)
        state = describe(self._fingerprint, self._gang, position)
        best = best_model(self._task, position)
        self._best_step = best.step if best else None
        self._blocked = time.monotonic() - began
        self._writer.submit(position.step, tensors, state)
        self._saved_step = position.step

    def _checkpoint_written(self, written: Written) -> None:
        # On the writer's thread; the training's reads what is set here once it has waited for this one.
        size = sum(entry.size for entry in written.manifest.values())
        report = CheckpointWritten(
            step=written.step,
            path=str(written.path),
            manifest=written.manifest,
            best_step=self._best_step,
        )
        if report.best:
            self._best = CheckpointRef(
                id="own", step=report.step, path=report.path, manifest=report.manifest
            )
        self._reporter.send(report)
        which = ", the best so far" if report.best else ""
        self._reporter.say(
            f"checkpoint of step {written.step}{which}: {size / 1e6:.1f} MB in "
            f"{written.seconds:.2f} s, training waited {self._blocked:.2f} s"
        )


def best_model(task: Task, position: Position) -> Best | None:
    """The model to be delivered, if training ended at ``position``; None: the last, as without early
    stopping."""
    if task.spec.early_stopping is None:
        return None
    return best_of(position.evaluations, task.judged_by, task.is_better)


class _Means:
    """Means over the steps since something was last said or kept."""

    def __init__(self) -> None:
        self._steps = 0
        self._loss = self._norm = self._seconds = 0.0
        self._examples = 0
        self._tokens = 0.0

    def add(self, loss: float, norm: float, examples: int, tokens: float, seconds: float) -> None:
        self._steps += 1
        self._loss += loss
        self._norm += norm
        self._examples += examples
        self._tokens += tokens
        self._seconds += seconds

    @property
    def loss(self) -> float:
        return self._loss / self._steps

    @property
    def norm(self) -> float:
        return self._norm / self._steps

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(1e-9, self._seconds)

    @property
    def examples_per_second(self) -> float:
        return self._examples / max(1e-9, self._seconds)


def _shown(value: float) -> str:
    """Counts are whole numbers."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _diverged(step: int, loss: float, norm: float) -> TrainingFailed:
    return TrainingFailed(
        FailureClass.USER_ERROR,
        "diverged",
        f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}",
        "Lower hyperparameters.learning_rate, add warm-up, or keep max_grad_norm set.",
    )
