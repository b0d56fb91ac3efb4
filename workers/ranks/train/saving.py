"""When a training makes a checkpoint, and what it then keeps of the best model."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shared.messages import CheckpointRef, CheckpointWritten
from shared.specs import Checkpointing
from workers.ranks.checkpoint import CheckpointWriter, Written
from workers.ranks.train.gang import Gang
from workers.ranks.train.reports import Reporter
from workers.ranks.train.state import Fingerprint, Position, describe, snapshot
from workers.ranks.train.stopping import Best, best_of
from workers.ranks.train.tasks import Task


class Saver:
    """Makes the checkpoints of one attempt. Every rank holds the same state, so a checkpoint is no
    collective: rank 0 alone decides and alone writes."""

    def __init__(
        self,
        *,
        rules: Checkpointing,
        task: Task,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        fingerprint: Fingerprint,
        gang: Gang,
        reporter: Reporter,
        folder: Path,
        best: CheckpointRef | None,
    ) -> None:
        """``best``: where rank 0 finds the best model so far, if another attempt has made it."""
        self._rules = rules
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._fingerprint = fingerprint
        self._gang = gang
        self._reporter = reporter
        self._writer = CheckpointWriter(folder, self._written)
        self._blocked = 0.0
        self._saved = time.monotonic()
        self._saved_step: int | None = None
        self.written_step: int | None = None
        """That of the newest checkpoint that is durable, of those that this rank has written."""
        self._best_step: int | None = None
        self.best = best
        """The checkpoint of the best model so far, on rank 0, once its writing has been waited for."""

    def due(self, position: Position) -> bool:
        """Whether to save now, of a training that goes on."""
        step, rules = position.step, self._rules
        if self._gang.rank != 0:
            return False
        if position.evaluations and position.evaluations[-1]["step"] == step:
            best = best_model(self._task, position)
            if best is not None and best.step == step:
                return True
        by_step = rules.every_steps is not None and step % rules.every_steps == 0
        seconds = time.monotonic() - self._saved
        by_time = rules.every_seconds is not None and seconds >= rules.every_seconds
        return by_step or by_time

    def save(self, position: Position) -> None:
        """Copy what training changes and have it written in the background; blocks for the copy."""
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
        self._saved = time.monotonic()

    def save_and_wait(self, position: Position) -> None:
        """Have the checkpoint of ``position`` durable when it returns, on rank 0."""
        if self._gang.rank == 0:
            if self._saved_step != position.step:
                self.save(position)
            self._writer.close()

    def close(self) -> None:
        """Wait for the write in the making; raises what it failed with."""
        self._writer.close()

    def _written(self, written: Written) -> None:
        # On the writer's thread; the training's reads what is set here once it has waited for this one.
        size = sum(entry.size for entry in written.manifest.values())
        report = CheckpointWritten(
            step=written.step,
            path=str(written.path),
            manifest=written.manifest,
            best_step=self._best_step,
        )
        if report.best:
            self.best = CheckpointRef(
                id="own", step=report.step, path=report.path, manifest=report.manifest
            )
        self._reporter.send(report)
        self.written_step = written.step
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
