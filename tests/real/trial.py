"""A training on real text as a user has it done, and its untrained twin: both used by a batch job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuyard import Client
from shared.views import JobDetail
from tests.e2e.inputs import write_jsonl
from tests.real.texts import Row, Split

TRAIN_TIMEOUT, BATCH_TIMEOUT = 400, 200
"""Seconds; several times what each takes on two cores that nobody else uses."""
STILL = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "warmup_ratio": None}
"""One step that moves no weight: what is delivered is what training began with."""
LOWER_HALF = ["*embeddings*", *(f"*layer.{number}.*" for number in range(3))]
"""Of MiniLM, to freeze: what is left learns as much here, in half the time."""
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    trained: JobDetail
    untrained: JobDetail
    answers: list[Answer]
    """Of the trained model to the held-out rows."""
    blank: list[Answer]
    """Of the untrained one to the same rows."""
    seconds: float
    """From the training's start to its end."""

    @property
    def metrics(self) -> dict[str, float]:
        """On the validation rows, after training."""
        return metrics(self.trained)

    @property
    def before(self) -> dict[str, float]:
        """On the validation rows, before training."""
        return metrics(self.untrained)


def run_trial(
    client: Client,
    folder: Path,
    data: Split,
    spec: Mapping[str, Any],
    *,
    publish: str,
    asked: Sequence[Row],
    batch: Mapping[str, Any] | None = None,
) -> Trial:
    """Train over two devices and publish; ask what was published, and the untrained model, the same.

    The twin is the same spec with the same seed, so it starts from the same new head or random weights.
    """
    parts = {"train": data.train, "validation": data.validation}
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in parts.items()}
    # Trainings of a minute need no checkpoints.
    base = {"kind": "train", "data": files, "checkpoint": {"every_seconds": None}, **spec}
    options = dict(spec["hyperparameters"])
    job = client.submit({**base, "resources": {"devices": 2}, "publish": publish}, upload=True)
    trained = client.wait(job.id, timeout=TRAIN_TIMEOUT)
    twin = client.submit(
        {**base, "publish": f"{publish}-untrained", "hyperparameters": {**options, **STILL}},
        upload=True,
    )
    question = {"kind": "infer", "task": spec["task"], "rows": list(asked), **(batch or {})}
    answering = client.submit({**question, "model": f"{publish}@latest"})
    untrained = client.wait(twin.id, timeout=TRAIN_TIMEOUT)
    guessing = client.submit({**question, "model": f"{publish}-untrained@latest"})
    return Trial(
        trained,
        untrained,
        _outputs(client, answering.id, len(asked)),
        _outputs(client, guessing.id, len(asked)),
        duration(trained),
    )


def metrics(job: JobDetail) -> dict[str, float]:
    """Of the evaluation with which the training ended."""
    assert job.summary is not None
    return dict(job.summary["metrics"])


def duration(job: JobDetail) -> float:
    """Seconds from its start to its end."""
    assert job.started_at is not None and job.finished_at is not None
    return (job.finished_at - job.started_at).total_seconds()


def _outputs(client: Client, id: str, count: int) -> list[Answer]:
    client.wait(id, timeout=BATCH_TIMEOUT)
    found = list(client.rows(id))
    assert [row["row"] for row in found] == list(range(count)), "each row once, in order"
    assert all(row["error"] is None for row in found), found
    return [row["output"] for row in found]
