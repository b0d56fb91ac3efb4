"""A training on real text as a user has it done, and its untrained twin: both used by a batch job."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from gpuyard import Client
from shared.views import JobDetail
from tests.e2e.inputs import write_jsonl
from tests.real.scores import Baseline, Score
from tests.real.sources import Source, SourceMissing, fetch
from tests.real.table import Line
from tests.real.texts import Row, Split

TRAIN_TIMEOUT, BATCH_TIMEOUT = 1000, 500
"""Seconds; many times what each takes on two cores that nobody else uses."""
STILL = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "warmup_ratio": None}
"""One step that moves no weight: what is delivered is what training began with."""
LOWER_HALF = ["*embeddings*", *(f"*layer.{number}.*" for number in range(3))]
"""Of MiniLM, to freeze: what is left learns as much here, in half the time."""
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    trained: JobDetail
    untrained: JobDetail
    rows: int
    """To train on."""
    answers: list[Answer]
    """Of the trained model to the held-out rows."""
    blank: list[Answer]
    """Of the untrained one to the same rows."""

    @property
    def metrics(self) -> dict[str, float]:
        """On the validation rows, after training."""
        return _metrics(self.trained)

    @property
    def before(self) -> dict[str, float]:
        """On the validation rows, before training."""
        return _metrics(self.untrained)

    @property
    def seconds(self) -> float:
        """From the training's start to its end."""
        started, finished = self.trained.started_at, self.trained.finished_at
        assert started is not None and finished is not None
        return (finished - started).total_seconds()

    def score(
        self, name: str, of: Callable[[list[Answer]], float], baseline: Baseline | None = None
    ) -> Score:
        """What ``of`` says of the answers of both models."""
        return Score(name, of(self.answers), of(self.blank), baseline)


class Trials:
    """Runs trials on one stack, and notes what they came to."""

    def __init__(self, client: Client, folder: Path, notes: list[Line]) -> None:
        self._client = client
        self._folder = folder
        self._notes = notes

    def need(self, source: Source) -> None:
        """Skips a trial whose text cannot be had here."""
        try:
            fetch(source)
        except SourceMissing as missing:
            lacks(str(missing))

    def run(
        self,
        data: Split,
        spec: Mapping[str, Any],
        *,
        publish: str,
        asked: Sequence[Row],
        batch: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Train over two devices and publish; ask what was published, and the untrained model, the same.

        The twin is the same spec with the same seed, so it starts from the same new head or random
        weights.

        Args:
            data: To train on, and to validate by.
            spec: Of the training, without its data.
            publish: The name to publish under; the twin gets ``-untrained`` behind it.
            asked: The rows of the batch jobs.
            batch: What else their specs say.
        """
        client, folder = self._client, self._folder / publish
        folder.mkdir()
        parts = {"train": data.train, "validation": data.validation}
        files = {
            name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in parts.items()
        }
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
        answers, blank = (self._outputs(job.id, len(asked)) for job in (answering, guessing))
        return Trial(trained, untrained, len(data.train), answers, blank)

    def tell(self, task: str, data: str, trial: Trial, judged_by: str, score: Score) -> None:
        """Adds a line to the table. ``judged_by`` is a metric of the evaluations while training."""
        before, after = (metrics[judged_by] for metrics in (trial.before, trial.metrics))
        self._notes.append(
            Line(task, data, trial.rows, trial.seconds, judged_by, before, after, score)
        )

    def _outputs(self, id: str, count: int) -> list[Answer]:
        self._client.wait(id, timeout=BATCH_TIMEOUT)
        found = list(self._client.rows(id))
        assert [row["row"] for row in found] == list(range(count)), "each row once, in order"
        assert [row["error"] for row in found if row["error"] is not None] == []
        return [row["output"] for row in found]


def lacks(reason: str) -> NoReturn:
    """What a trial needs is not here. CI has to have it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def only(column: str, rows: Sequence[Row]) -> list[Row]:
    """What is asked: the rows without the answer."""
    return [{column: row[column]} for row in rows]


def said(answers: Sequence[Answer]) -> list[str]:
    """The texts that were written."""
    return [answer["text"].strip() for answer in answers]


def _metrics(job: JobDetail) -> dict[str, float]:
    """Of the evaluation with which the training ended."""
    assert job.summary is not None
    return dict(job.summary["metrics"])
