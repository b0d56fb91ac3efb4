"""Telling MLflow and Weights & Biases of a training, by their own clients, where settings ask for it.

On rank 0, in a thread of its own: a server that is slow or away holds up no step. What fails is told once,
as a notice, and the training goes on without. A job is one run: its later attempts go on in it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.messages import Metric, TrainAssignment

if TYPE_CHECKING:
    from workers.ranks.train.reports import Reporter

JOB_TAG = "gpuyard.job_id"
_WAITING = 2_000
"""Metrics that wait for a server, at most: about ten trainings' worth."""
_END_SECONDS = 60.0
"""What the last metrics and the artifacts of a success get."""
_ABORT_SECONDS = 5.0
"""What they get where the attempt failed or has to leave."""
_LONGEST_PARAMETER = 500


class Tracker(Protocol):
    """One run of one service. Made when it begins; may raise anything at any time."""

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        """Values measured at a step; ``at`` is in seconds since 1970."""

    def keep(self, files: Sequence[Path]) -> None:
        """Keep these files with the run."""

    def end(self, ok: bool) -> None:
        """The attempt is over. A later one may go on."""


class Tracking:
    """Passes on to trackers what a training measures."""

    def __init__(self, assignment: TrainAssignment, reporter: Reporter) -> None:
        self._assignment = assignment
        self._reporter = reporter
        self._queue: queue.Queue[_Measured | _End] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._files: tuple[Path, ...] = ()
        self._thread.start()

    def metric(self, metric: Metric) -> None:
        """Never waits. What finds the queue full is lost to the trackers, not to the job."""
        values = {f"{metric.split}/{name}": value for name, value in metric.values.items()}
        try:
            self._queue.put_nowait(_Measured(values, metric.step, time.time()))
        except queue.Full:
            return

    def keep(self, files: Sequence[Path]) -> None:
        """Have these files kept with the run, at its end."""
        self._files = tuple(files)

    def close(self, ok: bool) -> None:
        """The attempt is over. Waits for the trackers, but not for ever."""
        seconds = _END_SECONDS if ok else _ABORT_SECONDS
        deadline = time.monotonic() + seconds
        try:
            self._queue.put(_End(ok), timeout=seconds)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        trackers = list(self._begin())
        while True:
            item = self._queue.get()
            for name, tracker in list(trackers):
                try:
                    item.tell(tracker, self._files)
                except Exception as error:
                    trackers.remove((name, tracker))
                    self._say(name, error)
            if isinstance(item, _End):
                return

    def _begin(self) -> Iterator[tuple[str, Tracker]]:
        wanted = self._assignment.tracking
        for name, asked, begin in (
            ("MLflow", wanted.mlflow_uri, Mlflow),
            ("Weights & Biases", wanted.wandb, WeightsAndBiases),
        ):
            if asked:
                try:
                    yield name, begin(self._assignment)
                except Exception as error:
                    self._say(name, error)

    def _say(self, name: str, error: Exception) -> None:
        lines = str(error).strip().splitlines()
        why = lines[0][:300] if lines else type(error).__name__
        message = f"{name} is told nothing more of this training: {why}"
        self._reporter.notice("tracker_failed", message, tracker=name)


@dataclass(frozen=True, slots=True)
class _Measured:
    values: Mapping[str, float]
    step: int
    at: float

    def tell(self, tracker: Tracker, files: Sequence[Path]) -> None:  # noqa: ARG002
        tracker.log(self.values, self.step, self.at)


@dataclass(frozen=True, slots=True)
class _End:
    ok: bool

    def tell(self, tracker: Tracker, files: Sequence[Path]) -> None:
        if self.ok:
            tracker.keep(files)
        tracker.end(self.ok)


class Mlflow:
    """A run of an MLflow server, or of a local store; found again by its tag ``gpuyard.job_id``."""

    def __init__(self, assignment: TrainAssignment) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric as Value
        from mlflow.entities import Param

        self._value = Value
        wanted, job = assignment.tracking, assignment.job_id
        self._client = MlflowClient(tracking_uri=wanted.mlflow_uri)
        found = self._client.get_experiment_by_name(wanted.mlflow_experiment)
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(wanted.mlflow_experiment)
        )
        runs = self._client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{job}'", max_results=1)
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        name = assignment.spec.name or job
        run = self._client.create_run(experiment, run_name=name, tags={JOB_TAG: job})
        self._run = run.info.run_id
        parameters = [Param(key, value) for key, value in parameters_of(assignment).items()]
        self._client.log_batch(self._run, params=parameters)

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        measured = [self._value(name, v, round(at * 1000), step) for name, v in values.items()]
        self._client.log_batch(self._run, metrics=measured)

    def keep(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run, str(file))

    def end(self, ok: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if ok else "FAILED")


class WeightsAndBiases:
    """A run under the job's id. Project, key and mode are W&B's own variables (WANDB_PROJECT, …)."""

    def __init__(self, assignment: TrainAssignment) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            id=assignment.job_id,
            name=assignment.spec.name or assignment.job_id,
            config=dict(parameters_of(assignment)),
            resume="allow",
            dir=assignment.work_dir,
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        # Its own steps only rise, and a resumed training goes back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int, at: float) -> None:
        self._run.log({**values, "step": step, "_timestamp": at})

    def keep(self, files: Sequence[Path]) -> None:
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")

    def end(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)
        self._wandb.teardown()


def parameters_of(assignment: TrainAssignment) -> dict[str, str]:
    """The spec, flat: ``hyperparameters.epochs`` and so on."""
    found: dict[str, str] = {}

    def walk(before: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(f"{before}.{name}" if before else str(name), inner)
        else:
            found[before] = str(value)[:_LONGEST_PARAMETER]

    walk("", assignment.spec.model_dump(mode="json", exclude_none=True))
    return found
