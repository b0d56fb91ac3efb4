"""Distillation (Hinton et al., 2015): a student also learns what a teacher thinks of every answer.

The loss is ``alpha`` times the cross entropy against the teacher's softened probabilities, and the rest
of it that against the truth. Both are summed over what is predicted: texts, words or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from shared.formats import DataFile
from shared.lifecycle import FailureClass
from shared.specs import Distilling, TrainSpec
from workers.ranks.loading import known_labels
from workers.ranks.train.device import Compute
from workers.ranks.train.examples import Batch, Examples
from workers.ranks.train.failures import TrainingFailed
from workers.ranks.train.order import Indices
from workers.ranks.train.tasks import Task, open_task
from workers.ranks.train.tasks.base import Predicts

_TEACHERS = "teacher."
"""Before the names of the teacher's inputs in a batch's targets."""


class Student(Predicts, Protocol):
    """A task whose model can be taught: it predicts one of a fixed set of answers."""

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch: ...


class Distillation:
    """What is minimised in place of the task's own loss. An ``Objective``.

    The teacher sees what the student sees, token by token, unless it reads texts with a tokenizer of its
    own: then it has ``own_examples`` of the same rows.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        model: nn.Module,
        order: Sequence[int],
        options: Distilling,
        smoothing: float,
        own_examples: Examples | None,
    ) -> None:
        """``model`` is the teacher's; ``order`` gives the teacher's class for each of the student's."""
        self._student = student
        self._teacher = teacher
        self._model = model.eval().requires_grad_(False)
        self._order = torch.tensor(list(order))
        self._options = options
        self._smoothing = smoothing
        self._own_examples = own_examples

    @property
    def teacher(self) -> nn.Module:
        return self._model

    def to(self, device: torch.device) -> None:
        self._model.to(device)
        self._order = self._order.to(device)

    def batch(self, examples: Examples, indices: Indices | Sequence[int], seed: int) -> Batch:
        batch = self._student.batch(examples, indices, seed)
        if self._own_examples is None:
            return batch
        theirs = self._teacher.batch(self._own_examples, indices, seed)
        added = {f"{_TEACHERS}{name}": tensor for name, tensor in theirs.inputs.items()}
        return replace(batch, targets={**batch.targets, **added})

    def loss(self, model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
        with compute.autocast():
            logits, truth = self._student.predict(model, batch)
        with torch.no_grad(), compute.autocast():
            taught, _ = self._teacher.predict(self._model, self._as_teacher_reads(batch))
        temperature, alpha = self._options.temperature, self._options.alpha
        hard = cross_entropy(logits, truth, reduction="sum", label_smoothing=self._smoothing)
        soft = kl_div(
            log_softmax(logits / temperature, dim=-1),
            log_softmax(taught[:, self._order] / temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
        # Soft gradients shrink with the square of the temperature (section 2 of the paper).
        return alpha * temperature**2 * soft + (1 - alpha) * hard

    def _as_teacher_reads(self, batch: Batch) -> Batch:
        if self._own_examples is None:
            return batch
        inputs = {
            name.removeprefix(_TEACHERS): tensor
            for name, tensor in batch.targets.items()
            if name.startswith(_TEACHERS)
        }
        return replace(batch, inputs=inputs)


def distil(
    task: Task, spec: TrainSpec, teacher_path: Path, train: DataFile, rows: Indices | None
) -> tuple[Distillation, str]:
    """(what to minimise, the teacher in words for the log).

    Texts may be read by a teacher with a tokenizer of its own; whose model chooses among words or tokens
    has to see the same ones.

    Args:
        task: The student's.
        rows: Of the training file, those that are trained on; None: all.

    Raises:
        LoadError: the teacher's folder cannot be used.
        TrainingFailed: it has other labels, or another vocabulary.
    """
    name, labels = teacher_path.name, task.loaded.labels
    # By name: a head of the right size for other labels would teach nonsense.
    if labels and sorted(known_labels(teacher_path) or ()) != sorted(labels):
        raise _other(f"the teacher '{name}' was not trained for these labels")
    teacher = open_task(spec, teacher_path, train, labels)
    if teacher.loaded.fresh:
        raise _other(f"the teacher '{name}' has no trained head for this task")
    same_tokens = _vocabulary(task) == _vocabulary(teacher)
    if not same_tokens and spec.task != "text-classification":
        raise _other(f"the teacher '{name}' has another vocabulary than the model that it teaches")
    own_examples = None if same_tokens else teacher.read(train)
    if own_examples is not None and rows is not None:
        own_examples = own_examples.subset(rows)
    assert isinstance(task, Predicts) and isinstance(teacher, Predicts)  # noqa: S101  see the spec
    objective = Distillation(
        task,
        teacher,
        teacher.loaded.model,
        _order(task, teacher),
        spec.teaching,
        spec.hyperparameters.label_smoothing,
        own_examples,
    )
    size = sum(p.numel() for p in teacher.loaded.model.parameters())
    return objective, f"{name}, {type(teacher.loaded.model).__name__} of {size:,} parameters"


def _vocabulary(task: Task) -> dict[str, int]:
    return dict(task.loaded.tokenizer.get_vocab())


def _order(task: Task, teacher: Task) -> list[int]:
    """The teacher's class for each of the student's. By name where classes have names; tokens are the
    same, but either model may have room for some that no text has."""
    if task.loaded.labels:
        return [teacher.loaded.labels.index(label) for label in task.loaded.labels]
    ours, theirs = (_outputs(each.loaded.model) for each in (task, teacher))
    if ours > theirs:
        raise _other(f"the teacher tells {theirs} tokens apart, and the model {ours}")
    return list(range(ours))


def _outputs(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _other(message: str) -> TrainingFailed:
    return TrainingFailed(
        FailureClass.USER_ERROR,
        "teacher_unsuitable",
        message,
        "A teacher does the same task, with the same labels or the same tokens.",
    )
