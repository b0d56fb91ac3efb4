"""Memory of the device, as far as the engine deals with it."""

from __future__ import annotations

import resource

import torch

from shared.messages import DeviceHandle

WORKING_SHARE = 0.15
"""Share of the device's memory kept for activations and the allocator's own needs."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator has no class of its own for it.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def cache_budget(device: DeviceHandle, model_bytes: int) -> int:
    """Bytes that the rows' caches may take beside a model of ``model_bytes``."""
    return max(0, int(device.memory_bytes * (1 - WORKING_SHARE)) - model_bytes)


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
