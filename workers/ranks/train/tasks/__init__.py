"""The NLP tasks that a rank can train for."""

from __future__ import annotations

from pathlib import Path

from shared.formats import DataFile
from shared.specs import TrainSpec
from workers.ranks.train.tasks.base import Task
from workers.ranks.train.tasks.text_classification import open_text_classification

__all__ = ["Task", "open_task"]


def open_task(spec: TrainSpec, model_path: Path, train: DataFile) -> Task:
    """The task of a spec on its loaded model.

    Raises:
        LoadError, TrainingFailed: the model, or the training data, cannot be used.
    """
    if spec.task == "text-classification":
        return open_text_classification(spec, model_path, train)
    raise AssertionError(f"no task '{spec.task}'")
