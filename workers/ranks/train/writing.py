"""Checkpoints made durable in the background, by several ranks together.

Each writer puts its part into the one folder aside; rank 0, once it has heard from all of them, adds
what is not tensors and puts the whole in place. What the ranks tell each other goes through the gang's
store and not the process group, whose calls belong to the training's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared.lifecycle import FailureClass
from shared.messages import FileDigest
from workers.ranks.checkpoint import Written, abandon, begin, finish, part_name, write_part
from workers.ranks.train.failures import TrainingFailed, explain
from workers.ranks.train.gang import Gang

_POLL_SECONDS = 0.01


class CheckpointWriter:
    """One rank's part in making checkpoints durable, on a thread of its own.

    At most one is in the making: a second ``submit`` needs a ``settle`` before it. A failed write
    ends the training at the next ``settle``, as training on without checkpoints is not what was
    asked for.

    It deletes nothing that is in place: only the worker knows which checkpoints are committed, and
    what was written while Postgres was slow must not push out the last one that counts.
    """

    def __init__(
        self,
        folder: Path,
        gang: Gang,
        writers: Sequence[int],
        written: Callable[[Written, float], None],
    ) -> None:
        """
        Args:
            writers: The ranks that write a part, rank 0 first.
            written: Called on rank 0, on the writer's thread, once a checkpoint is durable, with the
                seconds that took.
        """
        self._folder = folder
        self._gang = gang
        self._writers = writers
        self._written = written
        self._submitted = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing; rank 0 is as long as any of them."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether ``settle`` will raise."""
        return self._error is not None

    def submit(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        """Write this rank's ``tensors`` in the background; all ranks call it for the same step. They
        must not change before ``settle``. ``state`` counts on rank 0."""
        self._submitted = True
        if self._gang.rank in self._writers:
            self._thread = threading.Thread(
                target=self._run, args=(step, tensors, state), name="checkpoint-writer", daemon=True
            )
            self._thread.start()

    def settle(self) -> None:
        """Wait for the write in the making, all ranks together: when rank 0 returns, it is durable.

        Raises:
            Exception: what this rank's write failed with, or on rank 0 another's.
            TrainingFailed: another rank's failed, and that one will say why.
        """
        if not self._submitted:
            return
        self._submitted = False
        # Rank 0's thread waits for the other ranks. Its own waits for it only when all of them have
        # told what they wrote, so that the death of one is noticed, here, and not waited for.
        if self._gang.rank != 0:
            self._join()
        [failed] = self._gang.sum([float(self.failed)])
        self._join()
        if self._error is not None:
            raise self._error
        if failed:
            raise TrainingFailed(
                FailureClass.LOST_WORKER,
                "peer_lost",
                "another rank of the gang could not write its part of a checkpoint",
                "Its own failure says why.",
            )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        try:
            if self._gang.rank == 0:
                began = time.monotonic()
                written = self._write_whole(step, tensors, state)
                self._written(written, time.monotonic() - began)
            else:
                self._write_share(step, tensors)
        except BaseException as error:
            self._error = error

    def _write_share(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        key = _key(step, self._gang.rank)
        try:
            entry = self._write_own(begin(self._folder, step), tensors)
        except BaseException as error:
            self._gang.tell(key, {"failure": _words(explain(error))})
            raise
        self._gang.tell(key, {"digest": entry.model_dump()})

    def _write_whole(
        self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> Written:
        aside = begin(self._folder, step)
        try:
            try:
                own = self._write_own(aside, tensors)
            finally:
                # Also when there is no use for it: nobody writes into what is given up below.
                told = {rank: self._wait_for(step, rank) for rank in self._writers[1:]}
            for rank, each in told.items():
                _require_written(rank, each)
            entries = [own, *(FileDigest.model_validate(each["digest"]) for each in told.values())]
            names = [part_name(number, len(entries)) for number in range(len(entries))]
            return finish(aside, step, dict(zip(names, entries, strict=True)), state)
        except BaseException:
            abandon(aside)
            raise

    def _write_own(self, aside: Path, tensors: Mapping[str, torch.Tensor]) -> FileDigest:
        number = self._writers.index(self._gang.rank)
        return write_part(aside, number, len(self._writers), tensors)

    def _wait_for(self, step: int, rank: int) -> dict[str, Any]:
        while (told := self._gang.hear(_key(step, rank))) is None:
            time.sleep(_POLL_SECONDS)
        answer: dict[str, Any] = told
        return answer


def _key(step: int, rank: int) -> str:
    return f"part/{step}/{rank}"


def _words(failure: TrainingFailed) -> dict[str, str | None]:
    return {
        "failure_class": failure.failure_class,
        "code": failure.code,
        "message": failure.message,
        "hint": failure.hint,
    }


def _require_written(rank: int, told: Mapping[str, Any]) -> None:
    failure = told.get("failure")
    if failure is not None:
        raise TrainingFailed(
            FailureClass(failure["failure_class"]),
            failure["code"],
            f"rank {rank}: {failure['message']}",
            failure["hint"],
        )
