"""One step of a training, as the loop makes it: the moments at which most memory is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from shared.specs import Hyperparameters
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch
from workers.ranks.train.optimizer import add_l1, make_optimizer, regularised
from workers.ranks.train.tasks.base import Objective


class Step:
    """Forward, backward, update; and an evaluation's forward."""

    def __init__(
        self, objective: Objective, model: nn.Module, options: Hyperparameters, compute: Compute
    ) -> None:
        self._objective = objective
        self._model = model
        self._options = options
        self._compute = compute
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, options)

    def make_optimizer_state(self) -> None:
        """As it is after the first step."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def states(self) -> Iterable[torch.Tensor]:
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def keep_gradients(self) -> None:
        """As they lie in DDP's buckets, or are left by the micro-batch before."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def like_gradients(self) -> list[torch.Tensor]:
        """A sum of gradients that waits for another one."""
        return [torch.zeros_like(parameter) for parameter in self.trained]

    def train(self, batch: Batch) -> None:
        self._model.train()
        total = self._objective.loss(self._model, batch, self._compute)
        (total * 0.5).backward()  # type: ignore[no-untyped-call]
        del total
        if self._options.l1:
            add_l1(regularised(self._model), self._options.l1)
        nn.utils.clip_grad_norm_(self.trained, self._options.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, batch: Batch) -> None:
        """What judging a model takes at most: its answers, and their loss."""
        self._model.eval()
        with torch.no_grad():
            self._objective.loss(self._model, batch, self._compute)
        self._model.train()
