"""One small training for each task and kind of data: what ``test_tasks.py`` puts through its paces.

A case learns something that an untrained model cannot know, in a few seconds on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.harness import FILLER, TOPICS, make_bert, make_rows

Rows = Callable[[int, int], list[dict[str, Any]]]
"""(how many, seed) -> rows."""


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    model: Callable[[Path], Path]
    """Makes the model folder and returns it."""
    rows: Rows
    metric: str
    learned: float
    """What ``metric`` comes to at least after training, or at most where lower is better."""
    loads_as: str
    """The Auto class of Transformers that opens the delivered model."""
    problem: str = "single-label"
    lower_is_better: bool = False
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    spec_fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the spec: method, lora."""


def multi_label_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts about none to all of the topics; the labels are the topics."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        labels = [topic for topic in sorted(TOPICS) if draw.random() < 0.4]
        words = draw.choices(FILLER, k=draw.randint(2, 12))
        for topic in labels:
            words += draw.choices(TOPICS[topic], k=3)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": labels})
    return rows


def scored_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose score is the share of animals among their words, times ten."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animals, others = draw.randint(0, 6), draw.randint(4, 12)
        words = draw.choices(TOPICS["animal"], k=animals) + draw.choices(FILLER, k=others)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": round(10 * animals / len(words), 3)})
    return rows


CASES = (
    Case(
        name="single-label",
        task="text-classification",
        model=make_bert,
        rows=make_rows,
        metric="accuracy",
        learned=0.9,
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="lora",
        task="text-classification",
        model=make_bert,
        rows=make_rows,
        metric="accuracy",
        learned=0.9,
        loads_as="AutoModelForSequenceClassification",
        hyperparameters={"learning_rate": 3e-3, "dropout": 0.0, "epochs": 12},
        # The base is random here, so its embeddings have to be adapted as well.
        spec_fields={
            "method": "lora",
            "lora": {
                "r": 16,
                "alpha": 32,
                "dropout": 0.1,
                "targets": ["query", "key", "value", "dense", "word_embeddings"],
            },
        },
    ),
    Case(
        name="multi-label",
        task="text-classification",
        problem="multi-label",
        model=make_bert,
        rows=multi_label_rows,
        metric="micro_f1",
        learned=0.8,
        hyperparameters={"epochs": 20, "learning_rate": 2e-3, "dropout": 0.0},
        loads_as="AutoModelForSequenceClassification",
    ),
    Case(
        name="regression",
        task="text-classification",
        problem="regression",
        model=make_bert,
        rows=scored_rows,
        metric="pearson",
        learned=0.85,
        loads_as="AutoModelForSequenceClassification",
    ),
)
