"""Loss, accuracy and F1 over a validation set, each rank computing its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from workers.ranks.train.data import LabelledTexts
from workers.ranks.train.device import Compute
from workers.ranks.train.gang import Gang

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClassScore:
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``macro_f1`` is the mean of F1 over the classes that occur, as truth or as prediction."""

    loss: float
    accuracy: float
    macro_f1: float
    classes: tuple[ClassScore, ...]

    def values(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy, "macro_f1": self.macro_f1}


def evaluate(
    model: nn.Module,
    data: LabelledTexts,
    *,
    classes: int,
    batch_size: int,
    pad: int,
    compute: Compute,
    gang: Gang,
) -> Evaluation:
    """Evaluate on all ranks together; every rank gets the whole result. Leaves the model training.

    The loss is plain cross entropy, without label smoothing.
    """
    by_length = np.argsort(-data.lengths, kind="stable")
    starts = range(0, len(data), batch_size)
    hits, predicted = np.zeros(classes), np.zeros(classes)
    loss = 0.0
    model.eval()
    with torch.inference_mode(), compute.autocast():
        for start in list(starts)[gang.rank :: gang.world_size]:
            batch = data.batch(by_length[start : start + batch_size], pad).to(compute.device)
            logits = model(**batch.inputs).logits.float()
            loss += float(cross_entropy(logits, batch.labels, reduction="sum"))
            guess = logits.argmax(dim=-1)
            predicted += _count(guess, classes)
            hits += _count(guess[guess == batch.labels], classes)
    model.train()
    sums = np.array(gang.sum([loss, *hits, *predicted]))
    support = np.bincount(data.labels, minlength=classes).astype(np.float64)
    return score(sums[0], sums[1 : 1 + classes], sums[1 + classes :], support)


def score(loss: float, hits: Counts, predicted: Counts, support: Counts) -> Evaluation:
    """From counts by class: right predictions, predictions, and true examples; ``loss`` is a sum."""
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(predicted + support, 1)
    occurs = (predicted + support) > 0
    total = support.sum()
    return Evaluation(
        loss=float(loss / total),
        accuracy=float(hits.sum() / total),
        macro_f1=float(f1[occurs].mean()),
        classes=tuple(
            ClassScore(float(p), float(r), float(f), int(s))
            for p, r, f, s in zip(precision, recall, f1, support, strict=True)
        ),
    )


def by_label(evaluation: Evaluation, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The scores of each class under its label's name, as JSON can hold them."""
    return {
        label: {
            "precision": entry.precision,
            "recall": entry.recall,
            "f1": entry.f1,
            "support": entry.support,
        }
        for label, entry in zip(labels, evaluation.classes, strict=True)
    }


def _count(values: torch.Tensor, classes: int) -> Counts:
    # Counted on the host: on CUDA, bincount is not deterministic.
    return np.bincount(values.cpu().numpy(), minlength=classes).astype(np.float64)
