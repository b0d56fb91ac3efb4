"""Gradients added up over micro-batches, in turn or in the tree that ``order.micro_batches`` states.

A backward pass adds to the gradients that are there. For a tree they are set aside between two passes,
and added on later: by ``after``, or, where ranks exchange gradients, in the exchange of each bucket, so
that it goes on beside the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from workers.ranks.train.order import BatchPlan, MicroBatch

_Sum = dict[torch.Tensor, torch.Tensor]
"""By parameter."""


class GradientSums:
    """The sums of one rank that wait for another to be added to."""

    def __init__(
        self, trained: Sequence[nn.Parameter], wrapped: nn.Module, plan: BatchPlan
    ) -> None:
        """``wrapped``: the model as it is computed, by DDP where there is more than one rank."""
        self._trained = trained
        self._waiting: list[_Sum] = []
        self._exchanged = False
        if plan.tree and plan.accumulation > 2 and isinstance(wrapped, DistributedDataParallel):
            # Not the method itself: DDP takes no hook whose annotations are strings.
            wrapped.register_comm_hook(self, lambda sums, bucket: sums._join_and_exchange(bucket))
            self._exchanged = True

    def before(self, part: MicroBatch) -> None:
        """To be called before the backward pass of ``part``."""
        if part.apart:
            self._waiting.append({p: p.grad for p in self._trained if p.grad is not None})
            for parameter in self._trained:
                parameter.grad = None

    def after(self, part: MicroBatch, *, last: bool) -> None:
        """To be called after it; ``last``: of the step, the one that exchanges gradients."""
        if last and self._exchanged:
            self._waiting.clear()
            return
        for _ in range(part.joins):
            for parameter, gradient in self._waiting.pop().items():
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)

    def _join_and_exchange(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Add what waits, the latest first, to a bucket of gradients of the last micro-batch; then what
        DDP does with it on its own: the mean over the ranks."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for waiting in reversed(self._waiting):
                if parameter in waiting:
                    gradient.add_(waiting[parameter])
        gradients = bucket.buffer().div_(dist.get_world_size())
        exchange = dist.all_reduce(gradients, async_op=True)
        assert exchange is not None  # noqa: S101  every rank is in the group
        mean: torch.futures.Future[torch.Tensor] = exchange.get_future().then(_only)
        return mean


def _only(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
    return done.value()[0]
