"""Does each device of a training hold the whole model, or a part of it? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler import matching
from shared.resolved import Parallelism, Requirements
from shared.specs import TrainSpec
from shared.store.snapshot import DeviceState


@dataclass(frozen=True, slots=True)
class Choice:
    parallelism: Parallelism
    reason: str
    """For people."""


def choose_parallelism(
    spec: TrainSpec, whole: Requirements, sharded_bytes: int | None, fleet: Sequence[DeviceState]
) -> Choice:
    """What the spec says; ``auto`` is ddp, which is faster, unless the model fits in shards alone.

    Args:
        whole: What each device needs to hold all of the model.
        sharded_bytes: What each needs of it in shards, on the fewest devices; None: nothing is known.
        fleet: The devices that are known, busy ones included.
    """
    if spec.parallelism != "auto":
        return Choice(spec.parallelism, "as asked for")
    if sharded_bytes is None or not whole.memory_is_estimate or spec.not_in_shards is not None:
        return Choice("ddp", "the whole model on each device")
    known = [device for device in fleet if device.known]
    needed = matching.gigabytes(whole.memory_bytes)
    if matching.eligible_devices(whole, known):
        return Choice("ddp", f"a device of the fleet has the {needed} that the whole model needs")
    shards = in_shards(whole, sharded_bytes)
    if (missing := matching.unsatisfiable(shards, known)) is not None:
        return Choice("ddp", f"in shards it would not run either: {missing}")
    part = matching.gigabytes(sharded_bytes)
    return Choice(
        "fsdp",
        f"no device of the fleet has the {needed} that a rank with the whole model needs; over "
        f"{whole.devices} devices each needs {part}",
    )


def in_shards(whole: Requirements, sharded_bytes: int | None) -> Requirements:
    """What each device needs of a model in shards. What the user asked for stays."""
    if not whole.memory_is_estimate or sharded_bytes is None:
        return whole
    return whole.model_copy(update={"memory_bytes": sharded_bytes, "memory_from": "estimate"})
