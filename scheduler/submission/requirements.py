"""From a spec to what each device must have, and what is refused at once because of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler import matching
from scheduler.footprint import (
    ModelShape,
    inference_bytes,
    infers_in_bf16,
    teaching_bytes,
    training_bytes,
)
from shared.capability import GIB
from shared.errors import Unsatisfiable
from shared.resolved import Requirements
from shared.specs import Feature, InferSpec, TrainSpec
from shared.store.snapshot import DeviceState


def asked(spec: TrainSpec | InferSpec) -> Requirements:
    """What the user's own figures ask of each device. A precision is one: the device must have it."""
    resources = spec.resources
    precision = spec.hyperparameters.precision if isinstance(spec, TrainSpec) else spec.precision
    features: tuple[Feature, ...] = ("bf16",) if precision == "bf16" else ()
    usable = spec.world_sizes.usable if isinstance(spec, TrainSpec) else (resources.most,)
    return Requirements(
        devices=usable[0],
        world_sizes=usable if len(usable) > 1 else (),
        accelerator=resources.accelerator,
        memory_bytes=int((resources.memory_gb or 0) * GIB),
        compute_capability=round((resources.min_compute_capability or 0) * 10),
        features=tuple(dict.fromkeys(resources.features + features)),
        memory_is_estimate=resources.memory_gb is None,
    )


def requirements(
    spec: TrainSpec | InferSpec,
    shape: ModelShape | None,
    longest_text: int | None,
    teacher: ModelShape | None = None,
) -> Requirements:
    """What each device needs: the user's figures and, where there are none, those of the model.
    ``shape`` is None where nothing is known of it."""
    needs = asked(spec)
    if shape is None:
        return needs
    added: dict[str, object] = {}
    if needs.memory_is_estimate:
        taught = 0 if teacher is None else teaching_bytes(teacher)
        added["memory_bytes"] = estimate(spec, shape, longest_text) + taught
    if isinstance(spec, InferSpec) and infers_in_bf16(shape, spec):
        added["features"] = tuple(dict.fromkeys((*needs.features, "bf16")))
    return needs.model_copy(update=added)


def estimate(spec: TrainSpec | InferSpec, shape: ModelShape, longest_text: int | None) -> int:
    """The footprint of one rank in bytes."""
    if isinstance(spec, TrainSpec):
        return training_bytes(shape, spec, longest_text)
    return inference_bytes(shape, spec, longest_text)


def refuse_impossible(
    spec: TrainSpec | InferSpec, needs: Requirements, fleet: Sequence[DeviceState]
) -> None:
    """Say at once what waiting would not change.

    Without ``fail_fast`` only this is refused: the user's own figures, on a fleet in which no device
    has them. Too few devices, a fleet that is empty, and an estimate that fits nowhere wait: workers
    may come, and the estimate may be wrong. With ``fail_fast`` all of it is refused, by the devices
    that are live now.

    Raises:
        Unsatisfiable: says what is missing.
    """
    if spec.fail_fast:
        reason = matching.unsatisfiable(needs, [device for device in fleet if device.live])
        hint = "fail_fast refuses what would wait; leave it out to wait for devices."
    else:
        one = asked(spec).model_copy(update={"devices": 1})
        known = [device for device in fleet if device.known]
        reason = matching.unsatisfiable(one, known) if known else None
        hint = "Ask for less, or start a worker that has it; see `gpuyard workers`."
    if reason is not None:
        raise Unsatisfiable(reason, param="resources", hint=hint)
