"""Facts of trainings as they might have been, for what is written about them."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.messages import EndedAttempt
from shared.specs import TrainSpec
from workers.writeup.facts import Facts, Part, Point, Rows

BEGAN = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)


def make_points(count: int, total: int, *, gap: range = range(0)) -> list[Point]:
    """A loss that falls, with noise; none within ``gap``."""
    draw = random.Random(1)
    points = []
    for i in range(count):
        step = max(1, round((i + 1) * total / count))
        part = step / total
        loss = 0.15 + 1.2 * math.exp(-4 * part) * draw.uniform(0.85, 1.15)
        points.append(
            Point(
                step=step,
                loss=None if i in gap else loss,
                grad_norm=None if i in gap else draw.uniform(0.5, 3.0) * (1.2 - part),
                learning_rate=5e-5 * min(part / 0.1, (1 - part) / 0.9),
                examples_per_second=draw.uniform(88, 101),
                tokens_per_second=draw.uniform(2900, 3300),
                memory_bytes=round(812e6 + 40e6 * part),
                seconds=step * 0.33,
                at=BEGAN.timestamp() + step * 0.35,
            )
        )
    return points


def make_evaluations(count: int, total: int) -> list[dict[str, float]]:
    found = []
    for i in range(count):
        step, part = round((i + 1) * total / count), (i + 1) / count
        found.append(
            {
                "step": step,
                "loss": 0.2 + 0.9 * math.exp(-3 * part) + 0.05 * part,
                "accuracy": 0.93 - 0.5 * math.exp(-4 * part),
                "macro_f1": 0.91 - 0.55 * math.exp(-4 * part),
            }
        )
    return found


def make_confusion(classes: int) -> list[list[int]]:
    draw = random.Random(2)
    rows = []
    for t in range(classes):
        row = [draw.choice((0, 0, 0, 1, 3)) for _ in range(classes)]
        row[t] = draw.randint(40, 90)
        rows.append(row)
    return rows


def make_facts(**changes: Any) -> Facts:
    """A classification that was resumed once."""
    labels = changes.pop("labels", ("animal", "food", "place"))
    spec = TrainSpec.model_validate(
        {
            "kind": "train",
            "task": "text-classification",
            "name": "topics",
            "model": "minilm",
            "data": {"train": "file_train", "validation_split": 0.2},
            **changes.pop("spec", {}),
        }
    )
    evaluations = changes.setdefault("evaluations", make_evaluations(6, 330))
    per_class = {
        label: {"precision": 0.9, "recall": 0.8, "f1": 0.847, "support": 70} for label in labels
    }
    values = (
        {name: v for name, v in evaluations[-1].items() if name != "step"} if evaluations else {}
    )
    facts: dict[str, Any] = {
        "job_id": "job_01JD2V5N0W8R4QK7T9Y3ZB6XEM",
        "spec": spec.model_dump(mode="json", exclude_none=True),
        "parameters": 22_714_755,
        "trained_parameters": 22_714_755,
        "rows": [
            Rows("train", "file_train", 2000, "ab" * 32, 24, 118, 3),
            Rows("validation", "0.2 of file_train", 400, "cd" * 32, 25, 101, 0),
        ],
        "labels": labels,
        "batch": "2 ranks × 8 micro-batch × 2 accumulation = 32",
        "precision": "fp32",
        "device_kind": "cpu",
        "steps": 330,
        "total_steps": 330,
        "steps_per_epoch": 55,
        "seconds": 118.0,
        "stopped_early": False,
        "judged_by": "accuracy",
        "goal": "maximize",
        "values": values,
        "details": {"per_class": per_class, "confusion": make_confusion(len(labels))},
        "points": make_points(330, 330),
        "parts": [Part(1, 0, 2, "cpu0@a"), Part(2, 150, 2, "cpu1@a")],
        "ended": [
            EndedAttempt(
                number=1,
                ranks=2,
                failure_class="lost_worker",
                code="lease_expired",
                message="cpu0@a was not heard of for 60 s",
                started_at=BEGAN,
                finished_at=BEGAN + timedelta(seconds=75),
            )
        ],
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "finished_at": BEGAN + timedelta(minutes=4),
        "samples": [
            {"text": "the old town at the lake", "reference": "place", "predicted": "food (61 %)"}
        ],
    }
    return Facts(**{**facts, **changes})
