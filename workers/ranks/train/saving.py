"""When a training makes a checkpoint, and what it then keeps of the best model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.lifecycle import FailureClass
from shared.messages import CheckpointRef, CheckpointWritten
from shared.specs import Checkpointing
from workers.ranks.checkpoint import Written
from workers.ranks.train.device import Compute
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.gang import Gang
from workers.ranks.train.interval import Cost, Interval, duration
from workers.ranks.train.pieces import own_pieces
from workers.ranks.train.reports import Reporter
from workers.ranks.train.shares import HostCopy, divide, find_writers
from workers.ranks.train.state import BUFFER, Fingerprint, Position, describe, tensors_of
from workers.ranks.train.stopping import Best, best_of
from workers.ranks.train.tasks import Task
from workers.ranks.train.writing import CheckpointWriter

_STATES = 3
"""Numbers kept per trained one, about: itself and AdamW's two."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """A checkpoint of this rank, in host memory."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    best_step: int | None
    waited: float


class Saver:
    """Makes the checkpoints of one attempt. Every rank holds the same state and saves its share of it
    after the same step; all ranks make the same calls in the same order.

    A best model that comes while a checkpoint is being written is held in memory until that is done. A
    better one takes its place, as nothing builds on the one before yet.
    """

    def __init__(
        self,
        *,
        rules: Checkpointing,
        best_model: Callable[[Position], Best | None],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fingerprint: Fingerprint,
        compute: Compute,
        gang: Gang,
        reporter: Reporter,
        folder: Path,
        best: CheckpointRef | None,
        device_mtbf: float,
    ) -> None:
        """
        Args:
            best_model: Which model training would deliver from a position, if another than its last.
            best: Where rank 0 finds the best model so far, if another attempt has made it.
            device_mtbf: Seconds of a device's work from one failure to the next, on average.
        """
        self._rules = rules
        self._best_model = best_model
        self._model = model
        self._optimizer = optimizer
        self._fingerprint = fingerprint
        self._gang = gang
        self._reporter = reporter
        self._writers = find_writers(folder, gang)
        if gang.sharded and len(self._writers) < gang.world_size:
            raise _not_shared(gang, self._writers)
        self._writer = CheckpointWriter(folder, gang, self._writers, self._written)
        self._copy, self._spare = HostCopy(compute), HostCopy(compute)
        self._held: _Copied | None = None
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        share = _STATES * trained // len(self._writers)
        self._interval = Interval(rules, device_mtbf / gang.world_size, share)
        self._cost = Cost()
        self._durable_after = 0.0
        self._saved = time.monotonic()
        self._saved_step: int | None = None
        self._wished = False
        self._submitted: _Copied | None = None
        self.written_step: int | None = None
        """That of the newest checkpoint that is durable, of those that this rank has written."""
        self.best = best
        """The checkpoint of the best model so far, on rank 0, once its writing has been waited for."""
        if self._interval.automatic and self._interval.seconds is not None:
            reporter.say(
                f"checkpoints: every {duration(self._interval.seconds)} or so; what one costs, and how "
                "often devices fail, will decide"
            )

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing; rank 0 is as long as any of them."""
        return self._writer.busy

    def wish(self) -> float:
        """Whether this rank wants a checkpoint behind the step to come. All ranks' wishes are added up
        in that step's all-reduce, as only rank 0 looks at the clock; so is a write's failure, which
        then comes out on all ranks together."""
        if self._writer.failed:
            return 1.0
        if self._gang.rank != 0 or self._writer.busy:
            return 0.0
        if self._held is not None:
            return 1.0
        every = self._interval.seconds
        return float(every is not None and time.monotonic() - self._saved >= every)

    def after_step(self, seconds: float, wishes: float) -> None:
        """A step took so long, and ``wishes`` is what the ranks' came to in it.

        Raises:
            Exception: as ``save``.
        """
        self._wished = wishes > 0 and self._held is None
        if wishes > 0:
            self._write_held()
        if self._gang.rank == 0:
            self._cost.step(seconds, writing=self._writer.busy)
            self._adapt()

    def due(self, position: Position) -> bool:
        """Whether to save now, of a training that goes on; the same on every rank."""
        step, rules = position.step, self._rules
        if position.evaluations and position.evaluations[-1]["step"] == step:
            best = self._best_model(position)
            if best is not None and best.step == step:
                return True
        return self._wished or (rules.every_steps is not None and step % rules.every_steps == 0)

    def save(self, position: Position) -> None:
        """Copy this rank's share of what training changes, and have it written in the background;
        blocks for the copy, and, unless this is the best model so far, for the checkpoint before it.

        Raises:
            Exception: what the write before this one failed with.
        """
        began = time.monotonic()
        best = self._best_model(position)
        is_best = best is not None and best.step == position.step
        # One rank may have written its part when another has not.
        hold = is_best and self._gang.sum([float(self._writer.busy)])[0] > 0
        if not hold:
            self._write_held()
            self._writer.settle()
        memory = self._spare if hold else self._copy
        copied = _Copied(
            step=position.step,
            tensors=memory.take(self._share(tensors_of(self._model, self._optimizer))),
            state=describe(self._fingerprint, self._gang, position),
            best_step=best.step if best else None,
            waited=time.monotonic() - began,
        )
        self._saved_step = position.step
        self._saved = time.monotonic()
        if hold:
            self._held = copied
        else:
            self._submit(copied)

    def save_and_wait(self, position: Position) -> None:
        """Have the checkpoint of ``position`` durable when rank 0 returns."""
        if self._saved_step != position.step:
            self.save(position)
        self.close()

    def close(self) -> None:
        """Wait for the write in the making, and write what is held; raises what that failed with."""
        self._write_held()
        self._writer.settle()

    def _write_held(self) -> None:
        if self._held is not None:
            self._writer.settle()
            held, self._held = self._held, None
            self._copy, self._spare = self._spare, self._copy
            self._submit(held)

    def _submit(self, copied: _Copied) -> None:
        self._submitted = copied
        self._writer.submit(copied.step, copied.tensors, copied.state)
        self._cost.waited(copied.waited)

    def _share(self, held: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What this rank writes: its shards, or its share of what every rank has."""
        if self._gang.sharded:
            return own_pieces(held, self._gang)
        tensors = dict(held)
        if self._gang.rank not in self._writers:
            return {}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        of_first = {name for name in tensors if name.startswith(BUFFER)}
        shares = divide(sizes, len(self._writers), of_first)
        return {name: tensors[name] for name in shares[self._writers.index(self._gang.rank)]}

    def _adapt(self) -> None:
        cost = self._cost.seconds
        if cost is not None and not self._writer.busy:
            told = self._interval.measured(cost, self._durable_after)
            if told is not None:
                self._reporter.notice(
                    "checkpoint_interval", told,
                    seconds=self._interval.seconds, cost=cost, durable_after=self._durable_after,
                )  # fmt: skip

    def _written(self, written: Written, seconds: float) -> None:
        # On the writer's thread; the training's reads what is set here once that one is not busy.
        copied = self._submitted
        assert copied is not None  # noqa: S101  this is what it came to
        size = sum(entry.size for entry in written.manifest.values())
        report = CheckpointWritten(
            step=written.step,
            path=str(written.path),
            manifest=written.manifest,
            best_step=copied.best_step,
        )
        if report.best:
            self.best = CheckpointRef(
                id="own", step=report.step, path=report.path, manifest=report.manifest
            )
        self._durable_after = seconds
        self._reporter.send(report)
        self.written_step = written.step
        which = ", the best so far" if report.best else ""
        by = f" by {len(self._writers)} ranks" if len(self._writers) > 1 else ""
        self._reporter.say(
            f"checkpoint of step {written.step}{which}: {size / 1e6:.1f} MB in {seconds:.2f} s{by}, "
            f"training waited {copied.waited:.2f} s"
        )


def _not_shared(gang: Gang, writers: Collection[int]) -> TrainingFailed:
    apart = ", ".join(str(rank) for rank in range(gang.world_size) if rank not in writers)
    return TrainingFailed(
        FailureClass.INFRASTRUCTURE,
        "checkpoints_not_shared",
        f"rank(s) {apart} cannot write where rank 0 keeps checkpoints, and only they have their shards "
        "of the model",
        "GPUYARD_DATA must be the same folder on all hosts.",
    )


def best_model(task: Task, position: Position) -> Best | None:
    """The model to be delivered, if training ended at ``position``; None: the last, as without early
    stopping."""
    if task.spec.early_stopping is None:
        return None
    return best_of(position.evaluations, task.judged_by, task.is_better)
