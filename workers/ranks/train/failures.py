"""What can end a rank, and how each is told: class, code, message, hint. No user sees a traceback."""

from __future__ import annotations

import errno
import re

import torch
import torch.distributed as dist

from shared.lifecycle import FailureClass
from workers.ranks.loading import LoadError


class TrainingFailed(Exception):
    """The work cannot go on, for a reason that is known and told."""

    def __init__(
        self, failure_class: FailureClass, code: str, message: str, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.failure_class = failure_class
        self.code = code
        self.message = message
        self.hint = hint


class DataProblem(TrainingFailed):
    """The data cannot be used as they are. ``name`` is the file's, ``place`` the row's in it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        name: str | None = None,
        place: str | None = None,
        hint: str | None = None,
    ) -> None:
        where = ", ".join(part for part in (name, place) if part)
        super().__init__(
            FailureClass.DATA_ERROR, code, f"{where}: {message}" if where else message, hint
        )


class Diverged(TrainingFailed):
    """Loss or gradient is no longer finite; ``scaled``: nor was it with any loss scale of fp16."""

    def __init__(self, message: str, *, scaled: bool = False) -> None:
        self.scaled = scaled
        super().__init__(
            FailureClass.USER_ERROR,
            "diverged",
            message,
            "The range of fp16 does not suffice: set hyperparameters.precision to 'bf16' or 'fp32', or "
            "lower the learning rate."
            if scaled
            else "Lower hyperparameters.learning_rate, add warm-up, or keep max_grad_norm set.",
        )


class Stopped(Exception):
    """The worker ordered the rank to end, or is gone. Nothing is reported: nobody waits for it."""


class Preempted(Exception):
    """The gang has left its devices in good order: what is done so far is in a checkpoint."""


# What gloo, NCCL and TCPStore say when the process at the other end of a connection is gone.
_PEER_GONE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused|aborted)|broken pipe|"
    r"socket (timeout|closed)|timed out waiting|unhandled system error",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    # The last is what oneDNN says.
    r"allocate memory|out of memory|not enough memory|could not create a (primitive|memory)",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"no space left|os error 28|disk quota exceeded", re.IGNORECASE)


def explain(error: BaseException, rows_at_once: int | None = None) -> TrainingFailed:
    """Classify what ended the rank, which held so many rows at once, if it had begun to compute.

    The order matters: an out-of-memory error inside NCCL names both, and memory is the cause.
    """
    if isinstance(error, TrainingFailed):
        return error
    if isinstance(error, LoadError):
        return TrainingFailed(FailureClass.USER_ERROR, error.code, error.message, error.hint)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(text):
        return TrainingFailed(
            FailureClass.OUT_OF_MEMORY,
            "out_of_memory",
            "the device's memory did not suffice for the model and its batches"
            if rows_at_once is None
            else f"the device's memory did not suffice for the model with {rows_at_once} "
            f"row{'' if rows_at_once == 1 else 's'} at once",
            "Use a smaller max_length, method lora or a smaller model, or ask for more "
            "resources.memory_gb."
            if rows_at_once == 1
            else "Set a smaller hyperparameters.micro_batch_size (batch_size stays: gradients are "
            "accumulated) or a smaller max_length, or ask for more resources.memory_gb.",
        )
    if _is_disk_full(error, text):
        return TrainingFailed(
            FailureClass.INFRASTRUCTURE,
            "disk_full",
            "the worker's disk is full: a checkpoint or the model could not be written",
            "Free space on the worker's data folder, or keep fewer checkpoints (checkpoint.keep).",
        )
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | OSError) and _PEER_GONE.search(text)
    ):
        return TrainingFailed(
            FailureClass.LOST_WORKER,
            "peer_lost",
            "another rank of the gang is gone",
            "Its own failure, where it reported one, says why.",
        )
    if re.search(r"CUDA error|device-side assert|AcceleratorError", text):
        return TrainingFailed(
            FailureClass.LOST_DEVICE, "device_error", f"the device failed: {_first_line(error)}"
        )
    return TrainingFailed(
        FailureClass.INFRASTRUCTURE,
        "internal_error",
        f"training stopped on an unexpected {type(error).__name__}: {_first_line(error)}",
        "The job's log has the details.",
    )


def _is_disk_full(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors is written in Rust and wraps the error in one of its own.
    return _DISK_FULL.search(text) is not None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
