"""A rank's side of the conversation with its worker, and its lines in the job's log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from shared.lifecycle import FailureClass
from shared.messages import (
    ArtifactWritten,
    Assignment,
    ComputeShards,
    JoinRendezvous,
    Measure,
    Metric,
    Notice,
    Preempt,
    Progress,
    Stop,
    TrainAssignment,
)
from workers.channel import Channel, ChannelClosed
from workers.ranks.checkpoint import digest
from workers.ranks.train.failures import Stopped, TrainingFailed
from workers.ranks.train.tracking import Tracking

RankChannel = Channel[Assignment | Measure | ComputeShards | JoinRendezvous | Stop | Preempt]
_PROGRESS_SECONDS = 0.25
_ASSIGNMENT_SECONDS = 60.0


def _kind(name: str) -> Literal["model", "metrics", "report", "file"]:
    if name.startswith(("model/", "adapter/")):
        return "model"
    if name == "report.html":
        return "report"
    return "metrics" if name.startswith("metrics.") else "file"


class Reporter:
    """Sends reports and takes orders. A worker that is gone, or orders a stop, raises ``Stopped``."""

    def __init__(self, channel: RankChannel) -> None:
        self._channel = channel
        self._speaks = False
        self._next_progress = 0.0
        self._preempt: Preempt | None = None
        self._leave_by = 0.0
        self.tracking: Tracking | None = None
        """Who else hears of what is measured, once somebody does."""
        self.rows_at_once: int | None = None
        """What the rank holds of the data, from when it begins to compute: said where memory runs out."""

    @property
    def asked_back(self) -> str | None:
        """Why the device is wanted back, if it is."""
        return None if self._preempt is None else self._preempt.reason

    @property
    def seconds_left(self) -> float:
        """Until the device has to be free, where it is wanted back."""
        return self._leave_by - time.monotonic()

    def receive_assignment(self) -> TrainAssignment:
        """The first message on the channel. Rank 0 speaks for the gang in the log from here on."""
        try:
            message = self._channel.receive(_ASSIGNMENT_SECONDS)
        except ChannelClosed:
            raise Stopped("the worker is gone") from None
        if not isinstance(message, TrainAssignment):
            raise TrainingFailed(
                FailureClass.INFRASTRUCTURE,
                "no_assignment",
                f"the rank got {type(message).__name__} instead of a training assignment",
            )
        self._speaks = message.rank == 0
        return message

    def check_orders(self, wait: float = 0.0) -> JoinRendezvous | None:
        """Take one order if there is one within ``wait`` seconds.

        Raises:
            Stopped: the order is to stop, or the worker is gone.
        """
        try:
            order = self._channel.receive(wait)
        except ChannelClosed:
            raise Stopped("the worker is gone") from None
        if isinstance(order, Stop):
            raise Stopped(order.reason)
        if isinstance(order, Preempt):
            self._preempt, self._leave_by = order, time.monotonic() + order.seconds
        return order if isinstance(order, JoinRendezvous) else None

    def wait_for_end(self) -> None:
        """Until the worker says that it is over, or is gone."""
        try:
            while True:
                self.check_orders(wait=60.0)
        except Stopped:
            return

    def send(self, report: BaseModel) -> None:
        """Raises Stopped when the worker is gone."""
        try:
            self._channel.send(report)
        except ChannelClosed:
            raise Stopped("the worker is gone") from None

    def say(self, line: str) -> None:
        """A line of the job's log, from rank 0 alone."""
        if self._speaks:
            print(line, flush=True)

    def notice(self, code: str, message: str, **data: object) -> None:
        self.say(f"note: {message}")
        self.send(Notice(code=code, message=message, data=data))

    def progress(self, progress: Progress, *, always: bool = False) -> None:
        """Sent by rank 0, at most 4 times a second unless ``always``."""
        now = time.monotonic()
        if self._speaks and (always or now >= self._next_progress):
            self._next_progress = now + _PROGRESS_SECONDS
            self.send(progress)

    def metric(self, metric: Metric) -> None:
        if self._speaks:
            self.send(metric)
            if self.tracking is not None:
                self.tracking.metric(metric)

    def artifact(self, artifacts: Path, file: Path) -> None:
        """Report a deliverable that is in place below ``artifacts``."""
        name = file.relative_to(artifacts).as_posix()
        entry = digest(file)
        self.send(
            ArtifactWritten(
                name=name,
                kind=_kind(name),
                path=str(file),
                size=entry.size,
                sha256=entry.sha256,
            )
        )
