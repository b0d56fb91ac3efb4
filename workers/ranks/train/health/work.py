"""How long a rank works at its own part of a step, before it waits for the others."""

from __future__ import annotations

import torch
from torch.autograd import Variable

from workers.ranks.train.device import Compute, Mark
from workers.ranks.train.gang import Gang


class OwnWork:
    """Of one step after another: ``begin``, ``ends_with``, ``seconds``, ``end``."""

    def __init__(self, compute: Compute, gang: Gang) -> None:
        self._compute = compute
        self._gang = gang
        self._began: Mark | None = None
        self._done: Mark | None = None

    def begin(self, step: int) -> None:
        self._gang.pulse.begin_step(step)
        self._began, self._done = self._compute.mark(), None

    def ends_with(self, loss: torch.Tensor) -> None:
        """The backward pass of ``loss`` is the last work of the step before gradients are exchanged.

        DDP exchanges them while the pass goes on, and waits for the last of them in a callback at its
        end. Callbacks run in the order in which they were asked for: ours comes before that one, as
        it is asked for with the first gradient.
        """
        if self._gang.world_size > 1:
            loss.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]

    def _backward_begins(self, _: torch.Tensor) -> None:
        Variable._execution_engine.queue_callback(self._is_done)

    def _is_done(self) -> None:
        self._done = self._compute.mark()
        self._gang.pulse.wait(self._done)

    def by_rank(self) -> list[float]:
        """Seconds in this rank's place, 0 in the others'. The device has to be done with the pass."""
        seconds = [0.0] * self._gang.world_size
        if self._began is not None and self._done is not None:
            seconds[self._gang.rank] = self._began.seconds_until(self._done)
        return seconds

    def end(self) -> None:
        self._gang.pulse.end_step()
