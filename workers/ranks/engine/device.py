"""The one place of the engine that knows CPU from CUDA: opening a device, and its memory.

The CUDA part follows PyTorch's documentation; it has not been run.
"""

from __future__ import annotations

import os
import re
import resource

import torch

from shared.messages import DeviceHandle

WORKING_SHARE = 0.15
"""Share of the device's memory kept for activations and the allocator's own needs."""


WEIGHT_SHARE = 0.5
"""Share of the device's memory for the weights of all models kept warm; the rest is for rows."""


class DeviceUnavailable(Exception):
    """The device of the assignment is not there."""


def open_device(handle: DeviceHandle) -> torch.device:
    """Bind the process to its device and give it its threads. Does nothing new the second time.

    Raises:
        DeviceUnavailable: CUDA sees no GPU.
    """
    torch.set_num_threads(handle.threads)
    if handle.kind == "cpu":
        return torch.device("cpu")
    if handle.uuid is not None:
        # One device a process, found by what survives a renumbering. Read when CUDA starts.
        os.environ["CUDA_VISIBLE_DEVICES"] = handle.uuid
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"device '{handle.id}' cannot be opened: CUDA sees no GPU")
    return torch.device("cuda", 0)


def is_device_lost(error: BaseException) -> bool:
    """Whether an exception says that the device itself failed: nothing in this process can use it."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, DeviceUnavailable) or bool(
        re.search(r"CUDA error|device-side assert|AcceleratorError", text)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator has no class of its own for it.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def cache_budget(device: DeviceHandle, model_bytes: int) -> int:
    """Bytes that the rows' caches may take beside models of ``model_bytes``."""
    return max(0, int(device.memory_bytes * (1 - WORKING_SHARE)) - model_bytes)


def weight_budget(device: DeviceHandle) -> int:
    """Bytes that models kept warm may take together. A larger one is tried all the same, alone."""
    return int(device.memory_bytes * WEIGHT_SHARE)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory used: since :func:`reset_peak` on CUDA, of the whole process's life on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_unused(device: torch.device) -> None:
    """Give freed memory back to the device, so that the next large piece finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
