"""The engine process of a device: keeps models warm and computes the rows of attempts.

What may come when: an assignment opens an attempt, beside those that are open; orders for shards and a
stop name theirs. A stop is answered with ``Done``, an attempt that cannot go on with ``Failed``; the others
go on. Orders of an attempt that is over are ignored: they crossed its end on the way.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError, GpuyardError, UnsupportedModel
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
    mark,
)
from workers.channel import Channel, ChannelClosed, ProtocolError
from workers.ranks.engine.attempt import Attempt, compute_dtype
from workers.ranks.engine.choosing import choose_engine
from workers.ranks.engine.device import (
    is_device_lost,
    is_out_of_memory,
    open_device,
    weight_budget,
)
from workers.ranks.engine.models import LoadedModel, ModelCache
from workers.ranks.engine.sharing import Computations
from workers.ranks.engine.signs import Signs
from workers.ranks.engine.vllm_process import VLLM_FAILED

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
    """The loop of the engine process."""

    def __init__(self, channel: Channel[Assignment | Order]) -> None:
        self._channel = channel
        self._signs = Signs(channel)
        self._models = ModelCache()
        self._computations = Computations()
        self._attempts: dict[str, Attempt] = {}
        self._broken = False
        """An attempt ended in a way after which nothing in this process can be trusted."""

    def serve(self) -> int:
        """Answer messages and compute between them.

        Raises:
            ChannelClosed: the worker is gone.
        """
        while True:
            message = None
            try:
                patience = self._patience()
                if patience != 0.0:
                    self._signs.rest()
                message = self._channel.receive(patience)
                if message is not None:
                    self._handle(message)
                else:
                    self._signs.begin("reading")
                    self._feed()
                    self._signs.begin("computing")
                    self._compute()
                    self._tell()
            except ChannelClosed:
                raise
            except Exception as error:
                # Nothing is known of what is broken: no attempt can go on.
                named = getattr(message, "attempt_id", "")
                for attempt_id in list(self._attempts) or [named]:
                    self._fail(attempt_id, error)
                return 1
            if self._broken:
                return 1

    def _patience(self) -> float | None:
        """How long to wait for a message: not at all while there is something to compute."""
        attempts = self._attempts.values()
        if any(attempt.busy for attempt in attempts):
            return 0.0
        due = [seconds for attempt in attempts if (seconds := attempt.pace.due_in()) is not None]
        return min(due, default=None)

    def _handle(self, message: Assignment | Order) -> None:
        match message:
            case InferAssignment():
                self._signs.begin("loading")
                try:
                    self._begin(message)
                except Exception as error:
                    self._fail(message.attempt_id, error)
            case ComputeShards():
                if (attempt := self._attempts.get(message.attempt_id)) is not None:
                    attempt.order(message.shards)
            case Stop():
                if (attempt := self._attempts.get(message.attempt_id)) is not None:
                    self._finish(attempt, message.reason)
            case _:
                raise ProtocolError(f"an engine has no use for a message of type '{message.type}'")

    def _begin(self, assignment: InferAssignment) -> None:
        started = time.monotonic()
        device = open_device(assignment.device)
        dtype = compute_dtype(assignment)
        loaded, warm = self._load(assignment, dtype, device)
        shared = self._computations.join(assignment, loaded)
        self._attempts[assignment.attempt_id] = Attempt(assignment, shared, warm)
        seconds = time.monotonic() - started
        name, precision = Path(assignment.model_path).name, str(dtype).removeprefix("torch.")
        how = "is warm" if warm else f"loaded in {seconds:.1f} s"
        of = mark(assignment.attempt_id)
        print(f"{of}model {name} ({precision}, {assignment.device.id}) {how}", flush=True)
        if not loaded.batches:
            why = "it computes rows that share a pass otherwise: rows go one by one"
            print(f"{of}{why}", flush=True)
        self._channel.send(
            Ready(
                attempt_id=assignment.attempt_id,
                seconds=0.0 if warm else seconds,
                warm=warm,
                models=tuple(self._models.paths),
            )
        )

    def _load(
        self, assignment: InferAssignment, dtype: torch.dtype, device: torch.device
    ) -> tuple[LoadedModel, bool]:
        """The model in the engine that is chosen, and whether it was warm. Where that was ``auto``'s choice and
        vLLM does not load the model, it is our own."""
        choice = choose_engine(assignment, os.environ)
        of = mark(assignment.attempt_id)
        print(f"{of}engine {choice.name}: {choice.reason}", flush=True)
        get = partial(
            self._models.get,
            assignment.spec.task,
            assignment.model_path,
            dtype,
            device,
            budget=weight_budget(assignment.device),
            in_use={model.key for model in self._computations.models},
        )
        try:
            return get(engine=choice.name)
        except UnsupportedModel as error:
            if error.code != VLLM_FAILED or assignment.spec.engine != "auto":
                raise
            print(f"{of}engine gpuyard: {error.message}", flush=True)
            return get(engine="gpuyard")

    def _feed(self) -> None:
        """Give the computations the rows they want."""
        for attempt in list(self._attempts.values()):
            try:
                for shard in attempt.feed():
                    self._channel.send(shard)
            except ChannelClosed:
                raise
            except Exception as error:
                self._fail(attempt.id, error)

    def _compute(self) -> None:
        """One step of the computation whose turn it is."""
        shared = self._computations.next()
        if shared is None:
            return
        try:
            step, seconds = shared.step()
        except Exception as error:
            for owner in list(shared.owners):
                self._fail(owner, error)
            return
        results: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for answered in step.results:
            results[answered.owner].append(answered.result)
        whole = sum(step.tokens.values())
        for owner in results.keys() | step.tokens.keys():
            if (attempt := self._attempts.get(owner)) is None:
                continue
            tokens = step.tokens.get(owner, 0)
            share = seconds * tokens / whole if whole else seconds / len(results)
            for shard in attempt.take(results[owner], tokens, share):
                self._channel.send(shard)

    def _tell(self) -> None:
        for attempt in self._attempts.values():
            if attempt.pace.due_in() == 0.0:
                self._channel.send(attempt.progress())

    def _finish(self, attempt: Attempt, reason: str) -> None:
        stopped = attempt.busy or reason != FINISHED
        summary = attempt.summary(stopped)
        self._close(attempt)
        print(
            f"{mark(attempt.id)}{'stopped: ' + reason if stopped else 'finished'}; {summary['rows']} rows, "
            f"{summary['errors']} with errors, in {summary['compute_seconds']} s",
            flush=True,
        )
        self._channel.send(Done(attempt_id=attempt.id, summary=summary))

    def _fail(self, attempt_id: str, error: Exception) -> None:
        failure = describe_failure(error, attempt_id)
        if (attempt := self._attempts.get(attempt_id)) is not None:
            self._close(attempt)
        print(f"{mark(attempt_id)}failed: {failure.message}", flush=True)
        self._channel.send(failure)
        if failure.failure_class in (FailureClass.INFRASTRUCTURE, FailureClass.LOST_DEVICE):
            self._broken = True

    def _close(self, attempt: Attempt) -> None:
        del self._attempts[attempt.id]
        self._computations.leave(attempt.shared, attempt.id)


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
