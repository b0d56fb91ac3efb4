"""Submission: a raw spec becomes one row, or an error that says what to change."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlmodel import Session, func, select

from scheduler.footprint import inference_bytes, sharded_bytes, training_bytes, training_length
from scheduler.submission.data import Inputs, resolve_training_data
from scheduler.submission.fitting import require_fit
from scheduler.submission.inline import rows_to_file
from scheduler.submission.models import FoundModel, resolve_model, resolve_teacher
from scheduler.submission.parallelism import Choice, choose_parallelism, in_shards
from scheduler.submission.requirements import refuse_impossible, requirements, train_device
from scheduler.submission.rows import resolve_rows
from scheduler.submission.schemas import require_usable_schema
from scheduler.submission.writing import write_once
from shared.errors import InvalidRequest, InvalidSpec
from shared.footprint import Configuration
from shared.footprint import configuration as make_configuration
from shared.messages import Shard
from shared.resolved import Resolved
from shared.settings import Settings
from shared.specs import InferSpec, TrainSpec, parse_spec
from shared.store import Store
from shared.store.footprints import known_needs
from shared.store.snapshot import DeviceState, read_devices
from shared.store.submit import find_by_idempotency_key, insert_job, new_job_id
from shared.tables import Job

MAX_KEY = 255
_READING: dict[str, Any] = {
    **dict.fromkeys(("kind", "task", "problem", "preference", "data", "input"), True),
    **dict.fromkeys(("format", "text_column", "shard_rows"), True),
    "hyperparameters": {"packing"},
}
"""Fields of a spec that say how its data are read."""


@dataclass(frozen=True, slots=True)
class Again:
    """Of a job that runs another one again."""

    of: str
    numbers: array[int] | None = None
    """Of its rows in the first input, where it has some of them."""


def submit(
    store: Store,
    settings: Settings,
    raw_spec: Any,
    idempotency_key: str | None = None,
    created_by: str | None = None,
    again: Again | None = None,
) -> tuple[Job, bool]:
    """Validate all of a spec, find its model and data, and insert the job.

    Reads files: call it in a thread. No database session is open while it does.

    Returns:
        The job, and whether it is new; a repeated idempotency key gives the first job.

    Raises:
        InvalidRequest: any of its subclasses; nothing was stored.
        IdempotencyMismatch: the key was used for another spec.
        Unavailable: Postgres cannot be reached.
    """
    check_key(idempotency_key)
    spec = parse_spec(raw_spec)
    content: bytes | None = None
    if isinstance(spec, InferSpec):
        require_usable_schema(spec)
        spec, content = rows_to_file(spec, settings)
    refuse_unstorable(spec.model_dump(mode="json"))
    owner = created_by or ""
    if idempotency_key is not None:
        first = store.call(find_by_idempotency_key, owner, idempotency_key, spec)
        if first is not None:
            return first, False
    resolved, shards = resolve(store, settings, spec, content)
    return store.call(
        insert_job,
        job_id=new_job_id(),
        spec=spec,
        resolved=resolved,
        shards=shards,
        idempotency_key=idempotency_key,
        created_by=owner,
        retry_of=again.of if again else None,
        numbers=again.numbers if again else None,
    )


@dataclass(slots=True)
class Known:
    """Models and data that were looked at already: the trials of a sweep mostly share them."""

    models: dict[str, FoundModel] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)


def resolve(
    store: Store,
    settings: Settings,
    spec: TrainSpec | InferSpec,
    content: bytes | None = None,
    known: Known | None = None,
) -> tuple[Resolved, tuple[Shard, ...]]:
    """Find what a valid spec names and work out what it needs; ``content`` are its inline rows.

    Raises:
        InvalidRequest: any of its subclasses.
        Unavailable: Postgres cannot be reached.
    """
    known = known or Known()
    key = spec.model_dump_json(include={"kind", "task", "model", "architecture"})
    if key not in known.models:
        known.models[key] = resolve_model(store, settings, spec)
    model = known.models[key]
    teacher = resolve_teacher(store, settings, spec) if isinstance(spec, TrainSpec) else None
    if content is not None and isinstance(spec, InferSpec):
        write_once(Path(spec.input or ""), content)
    key = spec.model_dump_json(include=_READING)
    if key not in known.inputs:
        known.inputs[key] = _resolve_inputs(store, settings, spec)
    inputs = known.inputs[key]
    if isinstance(spec, TrainSpec):
        require_fit(spec, model, teacher, inputs)
    fleet = store.call(_fleet, settings.device_timeout)
    configuration, estimate = footprint(spec, model, teacher, inputs, fleet)
    needs = requirements(spec, model.shape, estimate)
    if configuration is not None:
        needs = store.call(known_needs, configuration.key, needs)
    choice = Choice("ddp", "")
    if isinstance(spec, TrainSpec):
        part = _part(model, teacher, configuration, needs.devices)
        choice = choose_parallelism(spec, needs, part, fleet)
        if choice.parallelism == "fsdp":
            # Of a part there is arithmetic alone: it is not measured, and no peak is remembered.
            configuration, estimate, needs = None, part, in_shards(needs, part)
    refuse_impossible(spec, needs, fleet)
    found = Resolved(
        model=model.resolved,
        teacher=teacher.resolved if teacher else None,
        requirements=needs,
        parallelism=choice.parallelism,
        parallelism_reason=choice.reason,
        configuration=configuration,
        estimated_bytes=estimate,
        inputs=inputs.files,
    )
    return found, inputs.shards


def footprint(
    spec: TrainSpec | InferSpec,
    model: FoundModel,
    teacher: FoundModel | None,
    inputs: Inputs,
    fleet: Sequence[DeviceState],
) -> tuple[Configuration | None, int | None]:
    """(the configuration of a training, the bytes of a rank by arithmetic). None: nothing is known of the
    model, or only arithmetic is done."""
    if model.shape is None:
        return None, None
    if isinstance(spec, InferSpec):
        return None, inference_bytes(model.shape, spec, inputs.longest_text)
    if teacher is not None and teacher.shape is None:
        return None, None
    asked = make_configuration(
        spec,
        model.config,
        teacher.config if teacher else None,
        labels=len(inputs.labels or ()),
        length=training_length(model.shape, spec, inputs.longest_text),
        device=train_device(spec, fleet),
    )
    return asked, training_bytes(model.shape, asked, teacher.shape if teacher else None)


def _part(
    model: FoundModel, teacher: FoundModel | None, asked: Configuration | None, ranks: int
) -> int | None:
    """The bytes of each of so many ranks with the model in shards, as far as they are known."""
    if model.shape is None or asked is None or ranks == 1:
        return None
    return sharded_bytes(model.shape, asked, ranks, teacher.shape if teacher else None)


def check_key(key: str | None) -> None:
    """Raises InvalidRequest for what is no idempotency key."""
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters",
            param="Idempotency-Key",
        )


def _resolve_inputs(store: Store, settings: Settings, spec: TrainSpec | InferSpec) -> Inputs:
    if isinstance(spec, TrainSpec):
        return resolve_training_data(store, settings, spec)
    return resolve_rows(store, settings, spec)


def _fleet(session: Session, device_timeout: float) -> tuple[DeviceState, ...]:
    now = session.exec(select(func.clock_timestamp())).one()
    return read_devices(session, now, device_timeout)


def refuse_unstorable(value: Any, where: tuple[str, ...] = ()) -> None:
    """JSON allows what Postgres and UTF-8 do not: NUL, half a surrogate pair, 1e999.

    Raises:
        InvalidSpec: names the field.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_unstorable(item, (*where, str(key)))
    elif isinstance(value, list):
        for item in value:
            refuse_unstorable(item, where)
    elif isinstance(value, str) and not _is_text(value):
        param = ".".join(where)
        raise InvalidSpec(
            f"{param} holds a character that is no text (NUL or a surrogate)", param=param
        )
    elif isinstance(value, float) and not math.isfinite(value):
        param = ".".join(where)
        raise InvalidSpec(f"{param} must be a finite number", param=param)


def _is_text(value: str) -> bool:
    try:
        return "\0" not in value and value.encode() is not None
    except UnicodeEncodeError:
        return False
