"""One update: forward and backward over a global batch, agree with the other ranks, and move the weights.

Randomness is reseeded for every micro-batch from (seed, step, virtual shard), so a step that is computed
again after a crash is bitwise the step that was computed before: on the same world size, and on one
and two ranks alike where gradients are added up in a tree (``order.micro_batches``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from shared.specs import Hyperparameters
from workers.ranks.train.accumulate import GradientSums
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.failures import Diverged
from workers.ranks.train.gang import Gang
from workers.ranks.train.health.work import OwnWork
from workers.ranks.train.optimizer import add_l1, regularised
from workers.ranks.train.order import BatchPlan, Indices, MicroBatch, derive, micro_batches
from workers.ranks.train.parallel import Parallel, warm_up_batch
from workers.ranks.train.scaling import LossScale, unscale
from workers.ranks.train.schedule import Schedule
from workers.ranks.train.tasks.base import Objective
from workers.ranks.train.touched import TouchedRows


@dataclass(frozen=True, slots=True)
class Update:
    """What one step came to; the same on every rank."""

    loss: float
    """Mean over the weights of the global batch."""
    norm: float
    """Of the gradient, before it was clipped."""
    tokens: float
    rate: float
    """The learning rate that it was made with."""
    signals: list[float]
    """What each rank gave ``Stepper.step``, summed over the ranks."""
    own_seconds: list[float]
    """What each rank took for its own part, before it waited for the others."""
    scale: float | None = None
    """What the loss was multiplied by, with fp16."""
    skipped: bool = False
    """Whether that was too much: no weight was moved, and ``norm`` is not finite."""


class Stepper:
    """One rank's part in the updates of a training."""

    def __init__(
        self,
        *,
        options: Hyperparameters,
        objective: Objective,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        plan: BatchPlan,
        training: Examples,
        compute: Compute,
        gang: Gang,
        parallel: Parallel,
    ) -> None:
        self._options = options
        self._objective = objective
        self._optimizer = optimizer
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._regularised = regularised(model)
        self._schedule = schedule
        self._plan = plan
        self._training = training
        self._compute = compute
        self._gang = gang
        self._parallel = parallel
        warm_up = warm_up_batch(objective, training, plan, compute)
        self._touched = _touched_rows(model, options, plan, training, gang)
        model.train()

        def warm() -> None:
            objective.loss(model, warm_up, compute).backward()  # type: ignore[no-untyped-call]

        self._touched.try_out(warm)
        model.zero_grad(set_to_none=True)
        self._wrapped = parallel.wrap(objective, model, warm_up, self._touched.names)
        self._touched.clear()
        self._sums = GradientSums(self._trained, self._wrapped, plan)
        self._work = OwnWork(compute, gang)

    def step(
        self, step: int, indices: Indices, signals: Sequence[float], loss_scale: LossScale
    ) -> Update:
        """One update from one global batch. ``signals`` go with the step's all-reduce, so that all
        ranks hear of one another after the same step.

        Every rank computes its micro-batches and scales each loss so that DDP's mean over the ranks
        is the mean over the weights of the global batch (its examples, or its predicted tokens), also
        where that is a partial one.

        ``loss_scale`` counts where the precision needs it, and moves with what the step comes to.

        Raises:
            Diverged: loss or gradient is no longer finite (user_error), on every rank alike. Where the
                loss is scaled, only once there is no smaller scale.
        """
        self._work.begin(step)
        scale = loss_scale.factor if self._compute.scales_loss else None
        weight = max(1, int(self._training.weights[indices].sum()))
        masks = derive(self._options.seed, "masks", step)
        # Not in fp32: in which order losses are added up is to leave no trace.
        loss = torch.zeros((), dtype=torch.float64, device=self._compute.device)
        tokens = 0
        own = micro_batches(indices, self._plan, self._gang.rank)
        # The others wait for a rank with less to do of a partial batch: it computes some example for
        # nothing.
        spare = self._passes(indices) - len(own)
        parts = own + [MicroBatch(self._gang.rank, indices[:1])] * spare
        for number, part in enumerate(parts):
            last, counts = number + 1 == len(parts), number < len(own)
            batch = self._objective.batch(self._training, part.indices, masks)
            batch = batch.to(self._compute.device)
            self._compute.seed(derive(self._options.seed, "dropout", step, part.shard))
            self._sums.before(part)
            with nullcontext() if last else self._parallel.adding_up(self._wrapped):
                total = self._objective.loss(self._wrapped, batch, self._compute) * counts
                scaled = total * (self._gang.world_size / weight * (scale or 1.0))
                if last:
                    self._work.ends_with(scaled)
                scaled.backward()  # type: ignore[no-untyped-call]
            self._sums.after(part, last=last)
            loss += total.detach()
            tokens += batch.tokens if counts else 0
        gradients = [p.grad for p in self._trained if p.grad is not None]
        gradients += self._touched.exchange()
        if scale is not None:
            unscale(gradients, scale)
        if self._options.l1:
            # A rank's gradients are those of the gang by now, and so is what is added to them.
            add_l1(self._regularised, self._options.l1)
        # What is decided by the norm is decided on every rank alike.
        norm = self._parallel.clip(gradients, self._options.max_grad_norm)
        loss_sum, token_sum, *heard = self._gang.sum(
            [float(loss), tokens, *signals, *self._work.by_rank()]
        )
        said, own_seconds = heard[: len(signals)], heard[len(signals) :]
        mean = loss_sum / weight
        rate = self._schedule.rate(step)
        if not math.isfinite(mean) or not math.isfinite(norm):
            if scale is None or not loss_scale.back_off():
                raise Diverged(
                    f"training diverged at step {step + 1}: loss {mean}, gradient norm {norm}",
                    scaled=scale is not None,
                )
            self._forget_gradients()
            self._work.end()
            return Update(mean, norm, token_sum, rate, said, own_seconds, scale, skipped=True)
        loss_scale.went_well()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._touched.put()
        self._optimizer.step()
        self._forget_gradients()
        self._work.end()
        return Update(mean, norm, token_sum, rate, said, own_seconds, scale)

    def _forget_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._touched.clear()

    def _passes(self, indices: Indices) -> int:
        """How often a rank calls the model for a global batch. That is for each rank to choose, once at
        least, but of a model in shards, where all call it together: rank 0 has the most to do."""
        own = self._gang.rank if not self._gang.sharded else 0
        return max(1, len(micro_batches(indices, self._plan, own)))


def _touched_rows(
    model: PreTrainedModel,
    options: Hyperparameters,
    plan: BatchPlan,
    training: Examples,
    gang: Gang,
) -> TouchedRows:
    """What is exchanged by rows. Nothing where ranks exchange no gradients or have the model in shards,
    where a tree is to add them up, and where L1 touches all rows."""
    left_alone = gang.world_size == 1 or gang.sharded or plan.tree or options.l1
    tokens = float(training.lengths.mean()) * plan.global_batch
    return TouchedRows(model, math.inf if left_alone else tokens, gang)
