"""Rows of the store as the API shows them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from shared.lifecycle import AttemptState, FailureClass, JobState, LeaseState
from shared.store.read import DeviceRow
from shared.store.sweeps import TrialRow
from shared.sweeps import best_of
from shared.tables import (
    Artifact,
    Attempt,
    Checkpoint,
    Event,
    File,
    Job,
    Lease,
    LogChunk,
    Metric,
    PublishedModel,
    Sweep,
    Worker,
)
from shared.views import (
    ArtifactView,
    AttemptView,
    CheckpointView,
    DeviceRun,
    DeviceView,
    EventView,
    FailureView,
    FileView,
    JobDetail,
    JobView,
    LogView,
    MetricView,
    ModelView,
    ProgressView,
    RankView,
    SweepDetail,
    TrialView,
    WorkerView,
)


def job_view(job: Job) -> JobView:
    return JobView(**_job_fields(job))


def job_detail(
    job: Job,
    attempts: Sequence[Attempt],
    leases: Sequence[Lease],
    totals: dict[str, int] | None,
    device_seconds: float,
) -> JobDetail:
    """``totals``: of a batch job, see ``shared.store.ledger.row_totals``."""
    return JobDetail(
        **_job_fields(job),
        spec=job.spec,
        requirements=job.resolved["requirements"],
        attempts=[
            attempt_view(a, [lease for lease in leases if lease.attempt_id == a.id])
            for a in attempts
        ],
        rows_total=None if totals is None else totals["rows"],
        rows_done=None if totals is None else totals["done"],
        row_errors=None if totals is None else totals["errors"],
        input_tokens=None if totals is None else totals["input_tokens"],
        output_tokens=None if totals is None else totals["output_tokens"],
        device_seconds=device_seconds,
    )


def _job_fields(job: Job) -> dict[str, Any]:
    failure = failure_view(job.failure_class, job.failure)
    if job.state == JobState.CANCELLED:
        failure = FailureView(
            failure_class=FailureClass.CANCELLED,
            code="cancelled",
            message=job.cancel_reason or "cancelled",
        )
    return {
        "id": job.id,
        "kind": job.kind,
        "task": job.task,
        "name": job.name,
        "model": _model(job.spec),
        "state": JobState(job.state),
        "priority": job.priority,
        "waiting_reason": job.waiting_reason,
        "progress": progress_view(job),
        "failure": failure,
        "summary": job.summary,
        "retry_of": job.retry_of,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def _model(spec: dict[str, Any]) -> str:
    architecture = spec.get("architecture")
    return f"new {architecture['type']}" if architecture else str(spec["model"])


def progress_view(job: Job) -> ProgressView | None:
    """The last progress; with the time left while the job runs."""
    if job.progress is None:
        return None
    return ProgressView(**{**job.progress, "eta_seconds": _eta(job)})


def _eta(job: Job) -> float | None:
    """Seconds to the end while the job runs: what a training says itself, and of a batch job the rows
    left by rows a second."""
    progress = job.progress or {}
    if job.state != JobState.RUNNING:
        return None
    if (said := progress.get("eta_seconds")) is not None:
        return float(said)
    pace = progress.get("examples_per_second")
    if job.kind == "train" or not pace:
        return None
    left = max(0, int(progress["total_steps"]) - int(progress["step"]))
    return round(left / float(pace), 1)


def failure_view(failure_class: str | None, failure: dict[str, Any] | None) -> FailureView | None:
    if failure_class is None or failure is None:
        return None
    return FailureView(failure_class=FailureClass(failure_class), **failure)


def attempt_view(attempt: Attempt, leases: Sequence[Lease]) -> AttemptView:
    return AttemptView(
        id=attempt.id,
        number=attempt.number,
        token=attempt.token,
        state=AttemptState(attempt.state),
        world_size=attempt.world_size,
        micro_batch=attempt.micro_batch,
        ranks=[
            RankView(rank=x.rank, device_id=x.device_id, state=LeaseState(x.state)) for x in leases
        ],
        failure=failure_view(attempt.failure_class, attempt.failure),
        created_at=attempt.created_at,
        started_at=attempt.started_at,
        finished_at=attempt.finished_at,
    )


def event_view(event: Event) -> EventView:
    return EventView(**event.model_dump(exclude={"job_id"}))


def log_view(chunk: LogChunk) -> LogView:
    return LogView(**chunk.model_dump(exclude={"job_id"}))


def metric_view(metric: Metric) -> MetricView:
    return MetricView(**metric.model_dump(exclude={"job_id"}))


def checkpoint_view(checkpoint: Checkpoint) -> CheckpointView:
    return CheckpointView(**checkpoint.model_dump(), best=checkpoint.best)


def artifact_view(artifact: Artifact) -> ArtifactView:
    return ArtifactView(**artifact.model_dump())


def file_view(file: File) -> FileView:
    return FileView(**file.model_dump())


def device_view(row: DeviceRow, device_timeout: float) -> DeviceView:
    state = row.device.state
    if state == "up" and (row.seconds_silent > device_timeout or row.worker.ended_at is not None):
        state = "silent"
    elif state == "up" and row.device.suspect_until is not None:
        state = "suspect"
    fields = row.device.model_dump(exclude={"state", "compute_capability"})
    return DeviceView(
        **fields,
        state=state,
        compute_capability=row.device.compute_capability / 10,
        runs=[DeviceRun(job_id=job_id, rank=rank) for job_id, rank in row.runs],
        seconds_silent=round(row.seconds_silent, 3),
    )


def worker_view(worker: Worker) -> WorkerView:
    return WorkerView(**worker.model_dump())


def model_view(model: PublishedModel) -> ModelView:
    return ModelView(
        name=model.name,
        version=model.version,
        reference=f"{model.name}@{model.version}",
        job_id=model.job_id,
        task=model.task,
        stage=model.stage,
        metrics=model.metrics,
        tags=model.tags,
        created_at=model.created_at,
    )


def sweep_detail(sweep: Sweep, rows: Sequence[TrialRow]) -> SweepDetail:
    """A sweep with its trials, and the best of those that succeeded."""
    metric, goal = sweep.spec.get("metric"), sweep.spec.get("goal")
    for row in rows:
        objective = (row.job.summary or {}).get("objective")
        if metric is None and objective:
            metric, goal = objective["metric"], objective["goal"]
    trials = [_trial_view(row, metric) for row in rows]
    best = best_of([(trial.number, trial.value) for trial in trials], goal or "maximize")
    return SweepDetail(
        id=sweep.id,
        name=sweep.name,
        metric=metric,
        goal=goal,
        states=dict(Counter(str(trial.state) for trial in trials)),
        best=next((trial for trial in trials if trial.number == best), None),
        created_at=sweep.created_at,
        spec=sweep.spec,
        trials=trials,
    )


def _trial_view(row: TrialRow, metric: str | None) -> TrialView:
    succeeded = row.job.state == JobState.SUCCEEDED
    metrics = (row.job.summary or {}).get("metrics") or {} if succeeded else {}
    return TrialView(
        number=row.trial.number,
        job_id=row.job.id,
        state=JobState(row.job.state),
        parameters=row.trial.parameters,
        value=metrics.get(metric) if metric else None,
        metrics=metrics,
    )
