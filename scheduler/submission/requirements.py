"""From a spec to what each device must have, and what is refused at once because of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler import matching
from scheduler.footprint import ModelShape, inference_bytes, training_bytes
from shared.capability import GIB
from shared.errors import Unsatisfiable
from shared.resolved import Requirements
from shared.specs import Feature, InferSpec, TrainSpec
from shared.store.snapshot import DeviceState


def requirements(
    spec: TrainSpec | InferSpec, shape: ModelShape | None, longest_text: int | None
) -> Requirements:
    """What each device needs. The user's figures count; where there are none for memory, the
    footprint estimate. A precision that the user chose is a feature that the device must have."""
    asked = spec.resources
    features: list[Feature] = list(dict.fromkeys(asked.features))
    if _precision(spec) == "bf16" and "bf16" not in features:
        features.append("bf16")
    memory = 0
    if asked.memory_gb is not None:
        memory = int(asked.memory_gb * GIB)
    elif shape is not None:
        memory = estimate(spec, shape, longest_text)
    return Requirements(
        devices=asked.devices,
        accelerator=asked.accelerator,
        memory_bytes=memory,
        compute_capability=round((asked.min_compute_capability or 0) * 10),
        features=tuple(features),
        memory_is_estimate=asked.memory_gb is None,
    )


def estimate(spec: TrainSpec | InferSpec, shape: ModelShape, longest_text: int | None) -> int:
    """The footprint of one rank in bytes."""
    if isinstance(spec, TrainSpec):
        return training_bytes(shape, spec, longest_text)
    return inference_bytes(shape, spec, longest_text)


def refuse_impossible(
    needs: Requirements, fleet: Sequence[DeviceState], *, fail_fast: bool
) -> None:
    """Say at once what waiting would not change.

    Without ``fail_fast`` only this is refused: the user's own figures, on a fleet in which no device
    has them. Too few devices, a fleet that is empty, and an estimate that fits nowhere wait: workers
    may come, and the estimate may be wrong. With ``fail_fast`` all of it is refused, by the devices
    that are live now.

    Raises:
        Unsatisfiable: says what is missing.
    """
    if fail_fast:
        reason = matching.unsatisfiable(needs, [device for device in fleet if device.live])
        hint = "fail_fast refuses what would wait; leave it out to wait for devices."
    else:
        asked = needs.model_copy(update={"devices": 1})
        if needs.memory_is_estimate:
            asked = asked.model_copy(update={"memory_bytes": 0})
        known = [device for device in fleet if device.known]
        reason = matching.unsatisfiable(asked, known) if known else None
        hint = "Ask for less, or start a worker that has it; see `gpuyard workers`."
    if reason is not None:
        raise Unsatisfiable(reason, param="resources", hint=hint)


def _precision(spec: TrainSpec | InferSpec) -> str:
    return spec.hyperparameters.precision if isinstance(spec, TrainSpec) else spec.precision
