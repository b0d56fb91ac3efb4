"""On how many devices may a training run, and what does each hold at once? Pure arithmetic.

A global batch is cut into micro-batches, whatever the number of ranks. A world size is usable if it
divides how many they are: then each rank computes as many, and all come to the same training.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorldSizes:
    """How a global batch is cut, and the numbers of ranks that it can be cut for."""

    micro_batch: int
    """Examples that a rank holds at once, on every usable world size."""
    usable: tuple[int, ...]
    """Ascending; at least one."""
    waiting_sums: int
    """Copies of the gradients that a rank holds beside the one in the making, at most: where the
    number of ranks may change, gradients are added up in a tree."""


def fixed_world_size(batch: int, micro_batch: int | None, devices: int) -> WorldSizes:
    """A ``micro_batch`` above a rank's share is cut to it, so that a spec also runs on more devices.

    Raises:
        ValueError: the batch does not divide; the message is for the user.
    """
    if batch % devices:
        raise ValueError(
            f"hyperparameters.batch_size {batch} is the global batch and does not divide "
            f"evenly over resources.devices {devices}"
        )
    share = batch // devices
    micro = min(micro_batch or share, share)
    if share % micro:
        raise ValueError(
            f"hyperparameters.batch_size {batch} over resources.devices {devices} is {share} for "
            f"each rank, which is no multiple of hyperparameters.micro_batch_size {micro_batch}"
        )
    return WorldSizes(micro, (devices,), 0)


def world_sizes(batch: int, micro_batch: int | None, least: int, most: int) -> WorldSizes:
    """For a range of devices. ``micro_batch`` None: the share of a rank on the most devices.

    Raises:
        ValueError: no number of devices in the range is usable; the message is for the user.
    """
    between = range(least, most + 1)
    if micro_batch is None:
        dividing = [size for size in between if batch % size == 0]
        if not dividing:
            raise ValueError(
                f"hyperparameters.batch_size {batch} is the global batch and divides evenly over no "
                f"number of devices from {least} to {most} (resources.devices)"
            )
        micro_batch = batch // dividing[-1]
    if batch % micro_batch:
        raise ValueError(
            f"hyperparameters.batch_size {batch} is no multiple of hyperparameters.micro_batch_size "
            f"{micro_batch}"
        )
    shards = batch // micro_batch
    usable = tuple(size for size in between if shards % size == 0)
    if not usable:
        raise ValueError(
            f"hyperparameters.batch_size {batch} is {shards} micro-batches of {micro_batch}, which "
            f"divide evenly over no number of devices from {least} to {most} (resources.devices)"
        )
    waiting = max(waiting_sums(shards // size) for size in usable)
    return WorldSizes(micro_batch, usable, waiting)


def waiting_sums(accumulation: int) -> int:
    """Copies of the gradients that a rank holds at once, beside the one in the making, to add up those
    of so many micro-batches in a tree."""
    waiting = 0
    while accumulation % 2 == 0 and accumulation > 2:
        accumulation //= 2
        waiting += 1
    return waiting
