"""What the API answers, typed for both sides: FastAPI's response models are the SDK's types."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from shared.lifecycle import AttemptState, FailureClass, JobState, LeaseState

T = TypeVar("T")


class View(BaseModel):
    """Ignores fields of a newer server."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(View, Generic[T]):
    """One page of a list, newest first; pass ``next`` as ``cursor`` for the one after."""

    items: list[T]
    next: str | None = None


class ErrorBody(View):
    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    request_id: str | None = None


class ErrorEnvelope(View):
    error: ErrorBody


class FailureView(View):
    """Why a job or an attempt failed, and what to do."""

    failure_class: FailureClass
    code: str
    message: str
    hint: str | None = None


class ProgressView(View):
    step: int
    total_steps: int
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    examples_per_second: float | None = None
    tokens_per_second: float | None = None
    grad_norm: float | None = None
    memory_bytes: int | None = None
    """Of rank 0: what tensors held at most on its GPU, or what its process has on a CPU."""
    eta_seconds: float | None = None
    attempt: int | None = None


class RankView(View):
    rank: int
    device_id: str
    state: LeaseState


class AttemptView(View):
    id: str
    number: int
    token: int
    state: AttemptState
    world_size: int
    micro_batch: int | None = None
    """What its ranks held at once, where memory had run out with more before."""
    ranks: list[RankView] = []
    failure: FailureView | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobView(View):
    id: str
    kind: str
    task: str
    name: str | None = None
    model: str
    """As the spec names it."""
    state: JobState
    priority: int
    waiting_reason: str | None = None
    """Why a queued job does not run yet."""
    progress: ProgressView | None = None
    failure: FailureView | None = None
    summary: dict[str, Any] | None = None
    retry_of: str | None = None
    """The job that this one runs again."""
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobDetail(JobView):
    spec: dict[str, Any]
    requirements: dict[str, Any]
    attempts: list[AttemptView] = []
    rows_total: int | None = None
    rows_done: int | None = None
    row_errors: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    """Of the rows that are done."""
    device_seconds: float = 0.0
    """Over all attempts and ranks that have ended: from the moment a device was claimed until it was free."""

    @property
    def over(self) -> bool:
        return self.state.terminal


class EventView(View):
    id: int
    type: str
    message: str
    attempt: int | None = None
    data: dict[str, Any] = {}
    at: datetime


class LogView(View):
    id: int
    attempt: int
    rank: int
    text: str
    at: datetime


class MetricView(View):
    split: str
    step: int
    attempt: int
    values: dict[str, float]
    at: datetime


class CheckpointView(View):
    id: str
    attempt_id: str
    step: int
    size: int
    best: bool = False
    """The best model that was evaluated up to its step; kept for early stopping to deliver."""
    path: str
    created_at: datetime


class ArtifactView(View):
    id: str
    name: str
    kind: str
    size: int
    sha256: str
    path: str
    """On the service's own disk; over HTTP use the download address."""
    created_at: datetime


class TrialView(View):
    """One job of a sweep. ``value`` is of the sweep's metric, once the job has succeeded."""

    number: int
    job_id: str
    state: JobState
    parameters: dict[str, Any]
    value: float | None = None
    metrics: dict[str, float] = {}


class SweepView(View):
    id: str
    name: str | None = None
    metric: str | None = None
    """What the best trial is best in; not known before a trial has succeeded, unless it was given."""
    goal: str | None = None
    states: dict[str, int]
    """Trials by state."""
    best: TrialView | None = None
    created_at: datetime

    @property
    def over(self) -> bool:
        return all(JobState(state).terminal for state in self.states)


class SweepDetail(SweepView):
    spec: dict[str, Any]
    trials: list[TrialView]


class ModelView(View):
    """A version of a published model. Its files are the artifacts ``model/…`` of ``job_id``."""

    name: str
    version: int
    reference: str
    """What specs name: ``name@version``."""
    job_id: str
    task: str
    stage: str | None = None
    metrics: dict[str, Any] = {}
    tags: list[str] = []
    created_at: datetime


class FileView(View):
    id: str
    name: str
    size: int
    sha256: str
    created_at: datetime


class DeviceRun(View):
    """A rank of a job on a device."""

    job_id: str
    rank: int


class DeviceView(View):
    id: str
    host: str
    state: str
    """up, draining, gone, silent (registered as up and not heard of lately), or suspect (heard of, but
    it takes nothing of what it is sent)."""
    suspect_reason: str | None = None
    suspect_until: datetime | None = None
    """Until then it gets no work; after that one rank, to show whether it hears again."""
    accelerator: str
    model: str
    uuid: str | None = None
    compute_capability: float
    memory_bytes: int
    queue: str
    simulated: bool
    warm: list[str] = []
    runs: list[DeviceRun] = []
    """What it works for; several where batch jobs share it."""
    seconds_silent: float


class WorkerView(View):
    """The process that serves a device."""

    id: str
    device_id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    heartbeat_at: datetime
    ended_at: datetime | None = None


class UsageView(View):
    """What was used in a period: by the jobs of a key or project, on a day, or in all."""

    key: str | None = None
    """Of a group by key: its id; None where jobs were submitted without one."""
    key_name: str | None = None
    project: str | None = None
    """Of a group by project, or that of the key."""
    day: date | None = None
    jobs: int
    """Submitted in the period."""
    device_seconds: float
    rows: int
    row_errors: int
    input_tokens: int
    output_tokens: int


class UsageReport(View):
    """From ``since`` to before ``until``; the items add up to ``total``."""

    since: datetime
    until: datetime
    group: str | None = None
    items: list[UsageView]
    total: UsageView


class Health(View):
    status: str
    checks: dict[str, str] = {}
    version: str
