"""The end of a training on rank 0: the model, its metrics, and what is written about it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from shared.messages import TrainAssignment
from workers.ranks.train.deliver import (
    deliver,
    write_card,
    write_page,
    write_table,
    write_tensorboard,
)
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Examples
from workers.ranks.train.gang import Gang
from workers.ranks.train.gather import gather
from workers.ranks.train.order import BatchPlan
from workers.ranks.train.parallel import Parallel
from workers.ranks.train.reports import Reporter
from workers.ranks.train.state import Position
from workers.ranks.train.tasks import Task
from workers.ranks.train.tasks.base import Evaluation
from workers.writeup.facts import Facts

if TYPE_CHECKING:
    from workers.ranks.train.lora import Adapter

T = TypeVar("T")
Samples = Sequence[Mapping[str, Any]]
_WRITTEN = {
    "metrics.csv": write_table,
    "report.html": write_page,
    "tensorboard": write_tensorboard,
}


@dataclass(frozen=True)
class Ending:
    """All that is known when the last step is done; ``summary`` is the job's."""

    assignment: TrainAssignment
    task: Task
    plan: BatchPlan
    position: Position
    evaluation: Evaluation | None
    summary: Mapping[str, Any]
    training: Examples
    validation: Examples | None
    compute: Compute
    samples: Samples

    def deliver(self, adapter: Adapter | None, reporter: Reporter) -> None:
        """Write and report the artifacts.

        What is written for people must not cost the model: a failure there is told as a notice.

        Raises:
            OSError: model or metrics could not be written.
        """
        artifacts = Path(self.assignment.work_dir) / "artifacts"
        model, tokenizer = self.task.loaded.model, self.task.unused_tokenizer
        facts = _try(lambda: self.facts, "the report", reporter)

        def finish(folder: Path) -> None:
            self.task.finish(folder)
            if facts is not None:
                _try(lambda: write_card(folder, facts), "the model card", reporter)

        base = self.assignment.spec.model or ""
        written = deliver(artifacts, model, tokenizer, self.metrics, finish, adapter, base)
        if facts is not None:
            for what, write in _WRITTEN.items():
                written += _try(partial(write, artifacts, facts), what, reporter) or []
        for file in written:
            reporter.artifact(artifacts, file)
        if reporter.tracking is not None:
            reporter.tracking.keep([file for file in written if file.parent == artifacts])

    @property
    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds."""
        return {
            **self.summary,
            "labels": list(self.task.loaded.labels),
            "global_batch": self.plan.global_batch,
            "training_seconds": round(self.position.seconds, 3),
            "evaluations": self.position.evaluations,
            **(self.evaluation.details if self.evaluation else {}),
        }

    @cached_property
    def facts(self) -> Facts:
        # Before an adapter is merged: what is trained shows in what requires gradients.
        return gather(
            self.assignment,
            self.task,
            self.plan,
            self.position,
            self.evaluation,
            self.summary,
            self.training,
            self.validation,
            self.samples,
            self.compute,
        )


def take_samples(
    task: Task,
    validation: Examples | None,
    compute: Compute,
    gang: Gang,
    parallel: Parallel,
    reporter: Reporter,
) -> Samples:
    """What the finished model makes of some validation examples; of use on rank 0 alone.

    All ranks call it, before a model in shards is gathered: each computes the same, as such a model is
    called by all of them or by none.
    """
    if validation is None or (gang.rank != 0 and not gang.sharded):
        return []
    model = task.loaded.model

    def look() -> Samples:
        model.eval()  # type: ignore[no-untyped-call]
        with torch.inference_mode(), compute.autocast(), parallel.evaluating(model):
            return task.samples(validation, compute)

    return _try(look, "the samples of the report", reporter) or []


def _try(write: Callable[[], T], what: str, reporter: Reporter) -> T | None:
    try:
        return write()
    except Exception as error:
        traceback.print_exception(error)
        reporter.notice("report_failed", f"{what} could not be written: {error}")
        return None
