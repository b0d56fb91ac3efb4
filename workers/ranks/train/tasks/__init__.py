"""The NLP tasks that a rank can train for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.formats import DataFile
from shared.specs import SEQ2SEQ, TrainSpec
from workers.ranks.train.rows import find_labels
from workers.ranks.train.tasks.base import Task
from workers.ranks.train.tasks.embeddings import Embeddings
from workers.ranks.train.tasks.fill_mask import FillMask
from workers.ranks.train.tasks.preferences import Preferences
from workers.ranks.train.tasks.text2text import Text2Text
from workers.ranks.train.tasks.text_classification import open_text_classification
from workers.ranks.train.tasks.text_generation import TextGeneration
from workers.ranks.train.tasks.token_classification import TokenClassification

__all__ = ["Task", "open_task"]


def open_task(
    spec: TrainSpec, model_path: Path, train: DataFile, labels: Sequence[str] | None = None
) -> Task:
    """The task of a spec on its loaded model.

    Args:
        labels: Those of the training file ``train``, which is read for them where they are not given.

    Raises:
        LoadError, TrainingFailed: the model, or the training data, cannot be used.
    """
    if labels is None:
        needed = spec.labels_needed
        labels = find_labels(train, spec, at_least=needed) if needed else ()
    if spec.task == "text-classification":
        return open_text_classification(spec, model_path, labels)
    if spec.task == "token-classification":
        return TokenClassification.open(spec, model_path, labels)
    if spec.task in SEQ2SEQ:
        return Text2Text.open(spec, model_path, labels)
    if spec.preference is not None:
        return Preferences.open(spec, model_path, labels)
    if spec.task == "text-generation":
        return TextGeneration.open(spec, model_path, labels)
    if spec.task == "fill-mask":
        return FillMask.open(spec, model_path, labels)
    if spec.task == "embeddings":
        return Embeddings.open(spec, model_path, labels)
    raise AssertionError(f"no task '{spec.task}'")
