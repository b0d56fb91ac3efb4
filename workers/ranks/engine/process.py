"""The engine process of a device: keeps models warm and computes the rows of one attempt after another.

What may come when: an assignment opens an attempt; orders for shards belong to it; a stop ends it and is
answered with ``Done``. An attempt that cannot go on is answered with ``Failed``, and the engine waits for
the next. Orders of an attempt that is over are ignored: they crossed its end on the way.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

from shared.errors import DataError, GpuyardError
from shared.lifecycle import FailureClass
from shared.messages import (
    Assignment,
    ComputeShards,
    Done,
    Failed,
    InferAssignment,
    Order,
    Ready,
    Stop,
)
from workers.channel import Channel, ChannelClosed, ProtocolError
from workers.ranks.engine.attempt import Attempt, compute_dtype
from workers.ranks.engine.device import is_device_lost, is_out_of_memory, open_device
from workers.ranks.engine.models import ModelCache

FINISHED = "finished"
"""The reason of a stop that follows the last shard."""


def main(channel: Channel[Assignment | Order]) -> int:
    """Serve until the worker is gone; the exit status of the process.

    0 after the end of the channel. 1 after a failure that may have left the device or the process in
    a bad state: it was reported, and the worker starts a fresh engine.
    """
    # The tokenizers' own thread pool would take cores from torch's.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    engine = Engine(channel)
    try:
        return engine.serve()
    except ChannelClosed:
        return 0


class Engine:
    """The loop of the engine process; one attempt at a time."""

    def __init__(self, channel: Channel[Assignment | Order]) -> None:
        self._channel = channel
        self._models = ModelCache()
        self._attempt: Attempt | None = None

    def serve(self) -> int:
        """Answer messages and compute between them.

        Raises:
            ChannelClosed: the worker is gone.
        """
        while True:
            attempt_id = self._attempt.id if self._attempt else ""
            try:
                message = self._channel.receive(self._patience())
                if message is not None:
                    if isinstance(message, InferAssignment):
                        attempt_id = message.attempt_id
                    self._handle(message)
                elif self._attempt is not None:
                    self._compute(self._attempt)
            except ChannelClosed:
                raise
            except Exception as error:
                failure = describe_failure(error, attempt_id)
                self._attempt = None
                print(f"failed: {failure.message}", flush=True)
                self._channel.send(failure)
                if failure.failure_class in (
                    FailureClass.INFRASTRUCTURE,
                    FailureClass.LOST_DEVICE,
                ):
                    return 1

    def _patience(self) -> float | None:
        """How long to wait for a message: not at all while there is something to compute."""
        if self._attempt is None:
            return None
        return 0.0 if self._attempt.busy else self._attempt.pace.due_in()

    def _handle(self, message: Assignment | Order) -> None:
        match message:
            case InferAssignment():
                if self._attempt is not None:
                    self._finish(self._attempt, "replaced by another attempt")
                self._begin(message)
            case ComputeShards():
                if self._attempt is not None and message.attempt_id == self._attempt.id:
                    self._attempt.order(message.shards)
            case Stop():
                if self._attempt is not None:
                    self._finish(self._attempt, message.reason)
            case _:
                raise ProtocolError(f"an engine has no use for a message of type '{message.type}'")

    def _begin(self, assignment: InferAssignment) -> None:
        started = time.monotonic()
        device = open_device(assignment.device)
        dtype = compute_dtype(assignment)
        loaded, warm = self._models.get(assignment.spec.task, assignment.model_path, dtype, device)
        self._attempt = Attempt(assignment, loaded, warm)
        seconds = time.monotonic() - started
        name, precision = Path(assignment.model_path).name, str(dtype).removeprefix("torch.")
        how = "is warm" if warm else f"loaded in {seconds:.1f} s"
        print(f"model {name} ({precision}, {assignment.device.id}) {how}", flush=True)
        if not loaded.batches:
            print("it computes rows that share a pass otherwise: rows go one by one", flush=True)
        self._channel.send(Ready(seconds=0.0 if warm else seconds, warm=warm))

    def _compute(self, attempt: Attempt) -> None:
        if attempt.busy:
            for shard in attempt.step():
                self._channel.send(shard)
        if attempt.pace.due_in() == 0.0:
            self._channel.send(attempt.progress())

    def _finish(self, attempt: Attempt, reason: str) -> None:
        stopped = attempt.busy or reason != FINISHED
        summary = attempt.summary(stopped)
        self._attempt = None
        print(
            f"{'stopped: ' + reason if stopped else 'finished'}; {summary['rows']} rows, "
            f"{summary['errors']} with errors, in {summary['compute_seconds']} s",
            flush=True,
        )
        self._channel.send(Done(attempt_id=attempt.id, summary=summary))


def describe_failure(error: Exception, attempt_id: str) -> Failed:
    """Classify what ended an attempt. Mistakes of users are told in a sentence; anything unexpected
    leaves its traceback in the log."""
    if isinstance(error, GpuyardError):
        data = isinstance(error, DataError)
        return Failed(
            attempt_id=attempt_id,
            failure_class=FailureClass.DATA_ERROR if data else FailureClass.USER_ERROR,
            code=error.code,
            message=error.message,
            hint=error.hint,
        )
    if is_out_of_memory(error):
        return Failed(
            attempt_id=attempt_id,
            failure_class=FailureClass.OUT_OF_MEMORY,
            code="out_of_memory",
            message=f"the model does not fit into the device's memory: {str(error)[:300]}",
            hint="Ask for a device with more memory (resources.memory_gb), or use precision bf16.",
        )
    traceback.print_exception(error)
    if is_device_lost(error):
        return Failed(
            attempt_id=attempt_id,
            failure_class=FailureClass.LOST_DEVICE,
            code="device_error",
            message=f"the device failed: {str(error)[:300]}",
        )
    return Failed(
        attempt_id=attempt_id,
        failure_class=FailureClass.INFRASTRUCTURE,
        code="engine_error",
        message=f"the engine failed: {type(error).__name__}: {str(error)[:300]}",
    )
