"""What the parts say to one another: the hint on the broker, and the rank protocol.

**Hint** (scheduler -> Celery worker): a doorbell. Lost, late or doubled it does no harm, because
the worker claims the attempt in Postgres before it does anything.

**Rank protocol** (worker <-> rank or engine process): newline-delimited JSON over one socket pair.
The worker opens with one *assignment*; the process answers with *reports*; the worker may send
*orders* at any time. A rank never sees the database or the broker. EOF on the socket means that the
other side is gone: a rank then exits, a worker classifies the attempt's end.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from shared.footprint import Configuration
from shared.lifecycle import FailureClass
from shared.resolved import Parallelism
from shared.specs import DataFormat, InferSpec, TrainSpec


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


# --- broker -----------------------------------------------------------------------------------


class Hint(Message):
    """One per rank of an attempt. Says where to look, never what to do."""

    job_id: str
    attempt_id: str
    token: int
    rank: int

    @property
    def task_id(self) -> str:
        """The Celery task id: the same for every repeat of this hint."""
        return f"{self.attempt_id}.{self.rank}"


RUN_TASK = "gpuyard.run"
"""The one Celery task."""


# --- worker -> rank / engine ------------------------------------------------------------------


class DeviceHandle(Message):
    """The device a rank computes on. ``kind`` is what torch is told: simulated ones are 'cpu'."""

    id: str
    kind: Literal["cpu", "cuda"]
    uuid: str | None = None
    memory_bytes: int
    threads: int = 1
    bf16: bool = False


class FileDigest(Message):
    size: int
    sha256: str


class CheckpointRef(Message):
    """A committed checkpoint: a folder, and the size and SHA-256 of each file in it."""

    id: str
    step: int
    path: str
    manifest: dict[str, FileDigest]


UNFINISHED = ".writing-"
"""How the name of a checkpoint's folder begins as long as it is not whole."""
DEVICE_MTBF = 7 * 86400.0
"""Seconds of a device's work from one failure to the next, where nothing else is known: a week."""


class Tracking(Message):
    """Which services hear of a training besides gpuyard, by settings of the worker."""

    mlflow_uri: str | None = None
    mlflow_experiment: str = "gpuyard"
    wandb: bool = False

    @property
    def wanted(self) -> bool:
        return self.wandb or self.mlflow_uri is not None


class EndedAttempt(Message):
    """An attempt before this one, and why it ended."""

    number: int
    ranks: int
    failure_class: str
    code: str
    message: str
    started_at: datetime | None = None
    finished_at: datetime | None = None


class TrainAssignment(Message):
    """One rank of one attempt at a training job. Paths are absolute and already checked."""

    type: Literal["train"] = "train"
    job_id: str
    attempt_id: str
    attempt: int
    token: int
    rank: int
    world_size: int
    device: DeviceHandle
    spec: TrainSpec
    model_path: str
    """Empty for a model from scratch (``spec.architecture``)."""
    teacher_path: str | None = None
    train_path: str
    """Empty for a dataset that the rank makes (``spec.data.train``); so is ``validation_path``."""
    train_format: DataFormat = "jsonl"
    validation_path: str | None
    validation_format: DataFormat = "jsonl"
    work_dir: str
    """This attempt's own folder, made by the worker: checkpoints in ``checkpoints/``, deliverables in
    ``artifacts/``. No other attempt writes there, so a stale one can spoil nothing."""
    cache_dir: str | None = None
    """What attempts and jobs share, made by the worker: tokenised data. None: nothing is kept."""
    micro_batch: int | None = None
    """What a rank is to hold at once, where memory had run out with more before; None: as the spec says."""
    hung_after: float = 60.0
    """Seconds after which a rank that gives no sign of life is taken to hang; 0: none ever is."""
    resume_from: tuple[CheckpointRef, ...] = ()
    """Newest first. A damaged one is reported and the next is tried; none: start at step 0."""
    parallelism: Parallelism = "ddp"
    best_from: tuple[CheckpointRef, ...] = ()
    """The best models that those build on, which early stopping delivers in the end. Newest first."""
    device_mtbf: float = DEVICE_MTBF
    """Seconds of a device's work from one failure to the next, on average, as far as is known."""
    ended: tuple[EndedAttempt, ...] = ()
    """The attempts before this one, oldest first: for the report."""
    tracking: Tracking = Tracking()


class InferAssignment(Message):
    """An attempt at an inference job, handed to the device's warm engine process."""

    type: Literal["infer"] = "infer"
    job_id: str
    attempt_id: str
    attempt: int
    token: int
    device: DeviceHandle
    spec: InferSpec
    model_path: str
    input_path: str
    adapter_path: str | None = None


class Measure(Message):
    """Say how many bytes the tensors of this configuration take. Answered by ``Measured`` or ``Failed``."""

    type: Literal["measure"] = "measure"
    configuration: Configuration


class Shard(Message):
    """Rows ``first_row .. first_row + rows`` of the input: ``length`` bytes from ``offset``."""

    index: int
    first_row: int
    rows: int
    offset: int
    length: int


class ComputeShards(Message):
    """Order: compute these shards of the attempt, in this order, one report for each."""

    type: Literal["compute"] = "compute"
    attempt_id: str
    shards: tuple[Shard, ...]


class JoinRendezvous(Message):
    """Order: all ranks are claimed; rank 0 listens at ``address`` (host:port)."""

    type: Literal["join"] = "join"
    address: str


class Stop(Message):
    """Order: end now. What is committed stays; nothing further will be accepted."""

    type: Literal["stop"] = "stop"
    reason: str
    attempt_id: str = ""
    """Which of the engine's attempts; a rank has one."""


class Preempt(Message):
    """Order to a training rank: its device is wanted back in ``seconds``. Unless the training ends by
    then, the whole gang makes a checkpoint at its next step and ends as preempted."""

    type: Literal["preempt"] = "preempt"
    reason: str
    seconds: float


Order = Annotated[ComputeShards | JoinRendezvous | Stop | Preempt, Field(discriminator="type")]
Assignment = Annotated[TrainAssignment | InferAssignment, Field(discriminator="type")]
ToRank: TypeAdapter[
    TrainAssignment | InferAssignment | Measure | ComputeShards | JoinRendezvous | Stop | Preempt
] = TypeAdapter(
    Annotated[
        TrainAssignment
        | InferAssignment
        | Measure
        | ComputeShards
        | JoinRendezvous
        | Stop
        | Preempt,
        Field(discriminator="type"),
    ]
)


# --- rank / engine -> worker ------------------------------------------------------------------


class Listening(Message):
    """Rank 0 opened the rendezvous store and listens on ``port`` (all other ranks join there)."""

    type: Literal["listening"] = "listening"
    port: int


MARK = re.compile(r"\[(att_[0-9A-Z]+)\] ")
"""How a line of an engine's log begins that is about one of its attempts."""


def mark(attempt_id: str) -> str:
    """The beginning of a line about this attempt; see :data:`MARK`."""
    return f"[{attempt_id}] "


class Ready(Message):
    """The model is loaded. ``seconds`` it took; 0 where an engine had it warm."""

    type: Literal["ready"] = "ready"
    seconds: float
    warm: bool = False
    attempt_id: str = ""
    """Which of the engine's attempts; a rank has one."""
    models: tuple[str, ...] = ()
    """Folders of all models that the engine holds now."""


class Progress(Message):
    """Where the work stands, for people: at most a few a second."""

    type: Literal["progress"] = "progress"
    attempt_id: str = ""
    """Which of the engine's attempts; a rank has one."""
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
    """To the end, evaluations included. None: nobody has said."""


EngineWork = Literal["loading", "reading", "computing"]


class Alive(Message):
    """Of an engine, by a thread of its own: what it does, and for how many seconds the same step."""

    type: Literal["alive"] = "alive"
    work: EngineWork
    seconds: float


class Metric(Message):
    """Values of one split at one step, kept for good: ``{"loss": ..., "accuracy": ...}``."""

    type: Literal["metric"] = "metric"
    split: Literal["train", "validation"]
    step: int
    values: dict[str, float]


class CheckpointWritten(Message):
    """A checkpoint is complete, synced and renamed into place; the worker now commits its row."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    manifest: dict[str, FileDigest]
    best_step: int | None = None
    """The step of the best model up to here; without that one's checkpoint this one cannot end."""

    @property
    def best(self) -> bool:
        return self.best_step == self.step


class ArtifactWritten(Message):
    """A deliverable is complete. ``name`` is relative, with `/` and without `..`."""

    type: Literal["artifact"] = "artifact"
    name: str
    kind: Literal["model", "metrics", "report", "file"]
    path: str
    size: int
    sha256: str


class Notice(Message):
    """Something the user should know and that stops nothing (a damaged checkpoint was skipped)."""

    type: Literal["notice"] = "notice"
    code: str
    message: str
    data: dict[str, Any] = {}


class ShardComputed(Message):
    """A finished shard: one result a row, in input order (see ``shared/rows.py`` for the form)."""

    type: Literal["shard"] = "shard"
    attempt_id: str
    index: int
    results: tuple[dict[str, Any], ...]
    seconds: float


class Measured(Message):
    """All tensors of the configuration at the moment at which they are most, without the runtime."""

    type: Literal["measured"] = "measured"
    bytes: int
    seconds: float


class Done(Message):
    """The rank, or the attempt in the engine, has nothing left to do."""

    type: Literal["done"] = "done"
    attempt_id: str
    summary: dict[str, Any] = {}


class Failed(Message):
    """The work cannot go on. ``failure_class`` decides with the retry policy what follows."""

    type: Literal["failed"] = "failed"
    attempt_id: str
    failure_class: FailureClass
    code: str
    message: str
    hint: str | None = None
    rows_at_once: int | None = None
    """Of a training that ran out of memory over its batches: what the rank held."""


Report = (
    Listening
    | Ready
    | Progress
    | Alive
    | Metric
    | CheckpointWritten
    | ArtifactWritten
    | Notice
    | ShardComputed
    | Measured
    | Done
    | Failed
)
FromRank: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="type")])
