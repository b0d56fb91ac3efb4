"""From a spec to what each device must have, and what is refused at once because of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scheduler import matching
from scheduler.footprint import ModelShape, infers_in_bf16
from shared.capability import GIB
from shared.errors import Unsatisfiable
from shared.resolved import Requirements
from shared.specs import Feature, InferSpec, TrainSpec
from shared.store.snapshot import DeviceState

TF32 = 8.0
"""The compute capability from which matrix products of fp32 can be computed in TF32."""


def asked(spec: TrainSpec | InferSpec) -> Requirements:
    """What the user's own figures ask of each device. A precision is one: the device must have it."""
    resources = spec.resources
    precision = spec.hyperparameters.precision if isinstance(spec, TrainSpec) else spec.precision
    features: tuple[Feature, ...] = ("bf16",) if precision == "bf16" else ()
    usable = spec.world_sizes.usable if isinstance(spec, TrainSpec) else (1,)
    capability = max(resources.min_compute_capability or 0, TF32 if precision == "tf32" else 0)
    return Requirements(
        devices=usable[0],
        world_sizes=usable if len(usable) > 1 else (),
        most=spec.resources.most if isinstance(spec, InferSpec) else None,
        accelerator="cpu" if precision == "int8" else resources.accelerator,
        memory_bytes=int((resources.memory_gb or 0) * GIB),
        compute_capability=round(capability * 10),
        features=tuple(dict.fromkeys(resources.features + features)),
        memory_is_estimate=resources.memory_gb is None,
        memory_from="estimate" if resources.memory_gb is None else "user",
    )


def requirements(
    spec: TrainSpec | InferSpec, shape: ModelShape | None, estimate: int | None
) -> Requirements:
    """What each device needs: the user's figures and, where there are none, those of the model.
    ``shape`` and ``estimate``, the footprint of a rank in bytes, are None where nothing is known of it.
    """
    needs = asked(spec)
    if shape is None:
        return needs
    added: dict[str, object] = {}
    if needs.memory_is_estimate and estimate is not None:
        added["memory_bytes"] = estimate
    if isinstance(spec, InferSpec) and infers_in_bf16(shape, spec):
        added["features"] = tuple(dict.fromkeys((*needs.features, "bf16")))
    return needs.model_copy(update=added)


def train_device(spec: TrainSpec, fleet: Sequence[DeviceState]) -> Literal["cpu", "cuda"]:
    """What a training will compute on, as far as can be told: attention takes more on a CPU."""
    if spec.resources.accelerator != "auto":
        return spec.resources.accelerator
    known = [d for d in fleet if d.known]
    return "cpu" if known and all(d.capability.accelerator == "cpu" for d in known) else "cuda"


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
    if isinstance(spec, InferSpec) and spec.precision == "int8":
        hint = f"Precision int8 is for CPUs. {hint}"
    if reason is not None:
        raise Unsatisfiable(reason, param="resources", hint=hint)
