"""What the training tells of its steps, and what becomes of it: notices, or the end of the attempt."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shared.lifecycle import FailureClass
from shared.messages import Failed, TrainAssignment
from workers.ranks.train.failures import Diverged, Stopped
from workers.ranks.train.gang import Gang
from workers.ranks.train.health.norms import NormWatch
from workers.ranks.train.health.stragglers import Straggler, Stragglers
from workers.ranks.train.health.verdict import Hung
from workers.ranks.train.health.watch import Watch
from workers.ranks.train.reports import Reporter
from workers.ranks.train.step import Update

_CHECKPOINTS = 100
"""That are remembered."""
_PERSISTS = 10.0
"""Ranks are compared over so long, at least: what is shorter is no persistence."""


class Health:
    """Of one attempt, on one rank. All ranks find the same; rank 0 tells it."""

    def __init__(self, assignment: TrainAssignment, gang: Gang, reporter: Reporter) -> None:
        self._assignment = assignment
        self._gang = gang
        self._reporter = reporter
        self._norms = NormWatch()
        self._stragglers = Stragglers(least_seconds=_PERSISTS)
        self._checkpoints: deque[int] = deque(maxlen=_CHECKPOINTS)
        self._last: tuple[int, Update] | None = None
        self._leader_device: str = gang.share("leader_device", assignment.device.id)
        if gang.store is not None:
            gang.store.set(f"device/{gang.rank}", assignment.device.id)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, a rank that does not arrive ends the attempt."""
        if not self._assignment.hung_after:
            yield
            return
        store = self._gang.store
        assert store is None or isinstance(store, PrefixStore)  # noqa: S101  as ``join`` makes it
        watch = Watch(
            rank=self._gang.rank,
            world_size=self._gang.world_size,
            device=self._assignment.device.id,
            pulse=self._gang.pulse,
            store=None if store is None else store.underlying_store.clone(),  # type: ignore[attr-defined]
            leader_device=self._leader_device,
            hung_after=self._assignment.hung_after,
            on_hung=self._end,
        )
        watch.start()
        try:
            yield
        finally:
            watch.close()

    def after_step(self, step: int, update: Update, *, whole: bool, seconds: float) -> None:
        """``step`` steps are done with this one, which took ``seconds``; ``whole``: its batch was."""
        if update.skipped:
            return
        self._last = (step, update)
        # One that is not finite is that of a step that was left out, for a smaller scale of the loss.
        runs_away = math.isfinite(update.norm) and self._norms.add(step, update.norm)
        if runs_away and self._gang.rank == 0:
            self._reporter.notice(
                "gradient_norm_diverging",
                f"the gradient norm runs away since step {self._norms.since}: {update.norm:.3g} at step "
                f"{step}, where {self._norms.usual:.3g} was usual; a lower learning rate or more "
                "warm-up may help",
                step=step,
                since=self._norms.since,
                norm=update.norm,
                usual=self._norms.usual,
            )
        if self._gang.rank == 0 and self._gang.world_size > 1 and whole:
            for straggler in self._stragglers.add(update.own_seconds, seconds):
                self._tell(straggler)

    def after_checkpoint(self, step: int) -> None:
        """There is a checkpoint of ``step``; 0: there is none."""
        if step and step not in self._checkpoints:
            self._checkpoints.append(step)

    def explain(self, end: Diverged) -> Diverged:
        """``end`` with what is known of the steps and the checkpoints before."""
        said = [end.message]
        if self._last is not None:
            step, update = self._last
            said.append(f"the last good loss was {update.loss:.4g}, at step {step}")
        if self._norms.since is not None:
            said.append(f"the gradient norm had been running away since step {self._norms.since}")
        said.append(self._last_checkpoints())
        return Diverged("; ".join(said), scaled=end.scaled)

    def _last_checkpoints(self) -> str:
        if not self._checkpoints:
            return "there is no checkpoint"
        since, newest = self._norms.since, self._checkpoints[-1]
        good = [step for step in self._checkpoints if since is None or step < since]
        if not good:
            return f"the newest checkpoint is that of step {newest}, and there is none from before that"
        if good[-1] == newest:
            return f"the last good checkpoint is that of step {newest}"
        return (
            f"the newest checkpoint is that of step {newest}, the last good one was that of step "
            f"{good[-1]}"
        )

    def _tell(self, straggler: Straggler) -> None:
        device = self._device(straggler.rank)
        self._reporter.notice(
            "straggler",
            f"rank {straggler.rank} ({device}) takes {straggler.times:.1f} times as long as is usual in "
            f"the gang for its part of a step: the others wait {straggler.wait:.0%} of each step for it",
            rank=straggler.rank,
            device=device,
            times=round(straggler.times, 3),
            wait=round(straggler.wait, 3),
        )

    def _device(self, rank: int) -> str:
        assert self._gang.store is not None  # noqa: S101  there are others
        return self._gang.store.get(f"device/{rank}").decode()

    def _end(self, hung: Hung) -> None:
        """Report, and end this process, whose training waits for ever. Runs in the watch's thread."""
        where = f" ({hung.device})" if hung.device else ""
        message = f"rank {hung.rank}{where} hangs: it {hung.why}"
        hint = (
            "The attempt is ended and tried again. If it is always the same device, drain it. "
            "GPUYARD_HUNG_AFTER sets the patience, 0 switches this off."
        )
        try:
            self._reporter.say(f"failed: {message} {hint}")
            self._reporter.send(
                Failed(
                    attempt_id=self._assignment.attempt_id,
                    failure_class=FailureClass.INFRASTRUCTURE,
                    code="rank_hung",
                    message=message,
                    hint=hint,
                )
            )
        except Stopped:
            pass
        finally:
            sys.stdout.flush()
            os._exit(1)
