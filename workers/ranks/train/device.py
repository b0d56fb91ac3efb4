"""The one place that knows CPU from CUDA: which torch device, which backend, which precision."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.footprint import RUNTIME
from shared.lifecycle import FailureClass
from shared.messages import DeviceHandle
from shared.specs import TrainPrecision
from workers.ranks.train.failures import TrainingFailed

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
_RETURNED = 1 << 20
_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the work of a device, which on CUDA lags behind the process that gives it."""

    at: float
    event: torch.cuda.Event | None = None

    def reached(self) -> bool:
        """Whether the device has come so far."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def seconds_until(self, later: Mark) -> float:
        """Of the device's time. It has to have reached both."""
        if self.event is None or later.event is None:
            return later.at - self.at
        milliseconds: float = self.event.elapsed_time(later.event)
        return milliseconds / 1000


@dataclass(frozen=True, slots=True)
class Compute:
    """What a rank computes on, opened by ``open_device``."""

    device: torch.device
    backend: str
    """Of the process group: gloo or nccl."""
    half: torch.dtype | None
    """What autocast computes matrix products in; None: everything is fp32."""
    tf32: bool = False
    """Whether the factors of fp32 matrix products are rounded to 10 bits (Ampere and newer)."""

    @property
    def precision(self) -> str:
        if self.half is None:
            return "tf32" if self.tf32 else "fp32"
        return "fp16" if self.scales_loss else "bf16"

    @property
    def scales_loss(self) -> bool:
        """Whether gradients may be too small for the precision: those below 6e-8 are 0 in fp16."""
        return self.half is torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """For forward passes; parameters, gradients and the optimizer stay fp32."""
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)

    def seed(self, value: int) -> None:
        """Reseed everything that dropout draws from."""
        torch.manual_seed(value)

    def watch_memory(self) -> None:
        """Forget how much memory it took to get here: of a process on the CPU, which reads weights from
        mapped files, that says nothing about the training."""
        if self.device.type == "cpu":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is that of now

    def return_freed_memory(self) -> None:
        """From now on tensors of 1 MiB and more take no memory once they are freed.

        On the CPU glibc raises the size from which that is so with each such tensor that is freed, up to 32
        MiB, and keeps what is smaller. Where layers come and go in every pass, what it keeps in holes
        would be more than what shards save. On CUDA the allocator is PyTorch's own.
        """
        if self.device.type == "cpu":
            with contextlib.suppress(AttributeError):  # another C library
                ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED)

    def host_memory(self, size: int) -> torch.Tensor:
        """``size`` bytes on the host, which a copy from the device goes to without a detour."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def wait(self) -> None:
        """Until the device has done what it was given, copies to the host included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Bytes, for people: on CUDA what tensors held at most so far; on the CPU, where nothing counts
        tensors, the process's own pages now, those of mapped files left out."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        resident, shared = _STATM.read_text().split()[1:3]
        return (int(resident) - int(shared)) * _PAGE

    def mark(self) -> Mark:
        """Here and now in the work of the device."""
        if self.device.type != "cuda":
            return Mark(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return Mark(time.perf_counter(), event)

    def peak_memory(self) -> int | None:
        """Bytes that this rank took at most of its device: on CUDA what tensors held, and the allowance
        for the runtime; on the CPU the process's own pages since ``watch_memory``, those of mapped files
        left out. None where the kernel does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + RUNTIME
        try:
            status = Path("/proc/self/status").read_text()
            found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            most, *mapped = (
                int(found[name].split()[0]) for name in ("VmHWM", "RssFile", "RssShmem")
            )
        except (OSError, KeyError, ValueError):
            return None
        return (most - sum(mapped)) * 1024


def open_device(handle: DeviceHandle, precision: TrainPrecision) -> Compute:
    """Bind the process to its device and switch on deterministic kernels.

    Must be the first thing that touches the device: both environment variables are read when CUDA
    is initialised. The CUDA part follows PyTorch's notes on reproducibility; it has not been run.

    ``auto`` is bf16 where the device has it and else fp32, never fp16: that has a smaller range, so a
    training might skip steps or diverge that would not on another device.

    Raises:
        TrainingFailed: the device is not there (lost_device), or cannot compute in the precision.
    """
    torch.set_num_threads(handle.threads)
    torch.use_deterministic_algorithms(True)
    # With deterministic algorithms torch also fills every new tensor with NaN: nothing here reads
    # memory it has not written, so that would be time for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    half = _half(precision, handle)
    if handle.kind == "cpu":
        return Compute(device=torch.device("cpu"), backend="gloo", half=half)

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if handle.uuid is not None:
        # One device a process, found by what survives a renumbering.
        os.environ["CUDA_VISIBLE_DEVICES"] = handle.uuid
    if not torch.cuda.is_available():
        raise TrainingFailed(
            FailureClass.LOST_DEVICE,
            "device_unavailable",
            f"device '{handle.id}' cannot be opened: CUDA sees no GPU",
            "Look at the worker's host: driver, container device access, or a GPU that fell off.",
        )
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    if half is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise _unsupported(handle, "bf16", "Ask for resources.features ['bf16']")
    if precision == "tf32":
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise _unsupported(handle, "tf32", "Ask for resources.min_compute_capability 8.0")
        torch.set_float32_matmul_precision("high")
    return Compute(device=device, backend="nccl", half=half, tf32=precision == "tf32")


def _half(precision: TrainPrecision, handle: DeviceHandle) -> torch.dtype | None:
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and handle.bf16) else None


def _unsupported(handle: DeviceHandle, precision: str, advice: str) -> TrainingFailed:
    return TrainingFailed(
        FailureClass.USER_ERROR,
        "precision_unsupported",
        f"device '{handle.id}' does not compute in {precision}",
        f"{advice}, or set hyperparameters.precision to 'fp32'.",
    )
