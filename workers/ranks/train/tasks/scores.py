"""Scores made of counts by class: precision, recall, F1, and their means. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClassScore:
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Scores:
    """``macro_f1`` is the mean of F1 over the classes that occur, as truth or as prediction;
    ``micro_*`` are over all predictions together."""

    macro_f1: float
    micro_precision: float
    micro_recall: float
    micro_f1: float
    classes: tuple[ClassScore, ...]


def score(hits: Counts, predicted: Counts, support: Counts) -> Scores:
    """From counts by class: right predictions, predictions, and true ones."""
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(predicted + support, 1)
    occurs = (predicted + support) > 0
    return Scores(
        macro_f1=float(f1[occurs].mean()) if occurs.any() else 0.0,
        micro_precision=float(hits.sum() / max(1.0, predicted.sum())),
        micro_recall=float(hits.sum() / max(1.0, support.sum())),
        micro_f1=float(2 * hits.sum() / max(1.0, predicted.sum() + support.sum())),
        classes=tuple(
            ClassScore(float(p), float(r), float(f), int(s))
            for p, r, f, s in zip(precision, recall, f1, support, strict=True)
        ),
    )


def by_label(scores: Scores, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The scores of each class under its label's name, as JSON can hold them."""
    return {
        label: {
            "precision": entry.precision,
            "recall": entry.recall,
            "f1": entry.f1,
            "support": entry.support,
        }
        for label, entry in zip(labels, scores.classes, strict=True)
    }


def count(values: torch.Tensor, classes: int) -> Counts:
    """How often each class occurs. On the host: on CUDA, bincount is not deterministic."""
    return np.bincount(values.cpu().numpy(), minlength=classes).astype(np.float64)
