"""How long the rest of a training takes, by how long things took lately."""

from __future__ import annotations

from workers.ranks.train.order import BatchPlan

_REMEMBERED = 64
"""Steps that the pace is a mean over, about: more than the batches that are sorted by length together."""


class Pace:
    """Heard of as things are done; says what is left. Early stopping may end it before."""

    def __init__(self, plan: BatchPlan, evaluate_every: int | None) -> None:
        """``evaluate_every``: steps from one evaluation to the next; None: there is none."""
        self._plan = plan
        self._every = evaluate_every
        self._steps = 0
        self._step = 0.0
        self._evaluation = 0.0
        self._before: float | None = None

    def step(self, now: float, seconds: float) -> None:
        """A step that took ``seconds`` is done. What lay between it and the one before, checkpoints
        for instance, counts as well."""
        took = seconds if self._before is None else now - self._before
        self._before = now
        self._steps += 1
        # The first one waits for kernels to be chosen, and says little.
        share = 1.0 if self._steps <= 2 else max(1 / (self._steps - 1), 1 / _REMEMBERED)
        self._step += share * (took - self._step)

    def evaluation(self, now: float, seconds: float) -> None:
        """One that took ``seconds``, after a step."""
        self._evaluation = seconds
        self._before = now

    def left(self, done: int) -> float:
        """Seconds from the end of step ``done`` to the end of the last evaluation."""
        steps = self._plan.total_steps - done
        return steps * self._step + self._evaluations_left(done) * self._evaluation

    def _evaluations_left(self, done: int) -> int:
        """That of step ``done`` among them, if it is due: it comes next."""
        if self._every is None:
            return 0
        total = self._plan.total_steps
        return total // self._every - (done - 1) // self._every + (total % self._every > 0)
