"""Step 1 of a job's life: one row, its shards, and its first event, in one transaction."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from typing import Any

from sqlalchemy import insert
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, select

from shared import ids
from shared.errors import IdempotencyMismatch
from shared.lifecycle import JobState
from shared.messages import Shard as ShardRange
from shared.resolved import Resolved
from shared.specs import InferSpec, TrainSpec
from shared.store.engine import WAKE_SCHEDULER, wake
from shared.store.footprints import ask
from shared.store.guard import tell
from shared.store.retried import insert_numbers
from shared.tables import Job, Shard


def spec_digest(spec: TrainSpec | InferSpec) -> str:
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_by_idempotency_key(
    session: Session, created_by: str | None, key: str, spec: TrainSpec | InferSpec
) -> Job | None:
    """The job that this key made, if any.

    Raises:
        IdempotencyMismatch: the key made a job of another spec.
    """
    owner = created_by or ""
    job = session.exec(
        select(Job).where(Job.created_by == owner, Job.idempotency_key == key)
    ).first()
    if job is not None and job.spec_sha256 != spec_digest(spec):
        raise IdempotencyMismatch(
            f"the idempotency key was used for {job.id}, which has another spec",
            param="Idempotency-Key",
            hint="Use a new key for a new job.",
        )
    return job


def insert_job(
    session: Session,
    *,
    job_id: str,
    spec: TrainSpec | InferSpec,
    resolved: Resolved,
    shards: Iterable[ShardRange] = (),
    idempotency_key: str | None = None,
    created_by: str | None = None,
    retry_of: str | None = None,
    numbers: array[int] | None = None,
) -> tuple[Job, bool]:
    """Insert a queued job; with a used idempotency key, the first job. (job, whether it is new).

    Args:
        numbers: Of its rows in the first input, where they are rows of another job.

    Raises:
        IdempotencyMismatch: the key made a job of another spec.
    """
    footprint_key = None
    if resolved.configuration is not None and resolved.estimated_bytes is not None:
        asked = (resolved.configuration, resolved.estimated_bytes, resolved.requirements)
        resolved = resolved.model_copy(update={"requirements": ask(session, *asked)})
        footprint_key = asked[0].key
    values: dict[str, Any] = {
        "id": job_id,
        "kind": spec.kind,
        "task": spec.task,
        "name": spec.name,
        "state": JobState.QUEUED,
        "spec": spec.model_dump(mode="json"),
        "resolved": resolved.model_dump(mode="json"),
        "footprint_key": footprint_key,
        "priority": spec.priority,
        "idempotency_key": idempotency_key,
        "created_by": created_by or "",
        "spec_sha256": spec_digest(spec),
        "retry_of": retry_of,
    }
    # Two requests with one key race here: the unique index lets one in, the other waits for its
    # commit and then finds that job.
    inserted = session.execute(
        pg_insert(Job)
        .values(**values)
        .on_conflict_do_nothing(
            index_elements=["created_by", "idempotency_key"],
            index_where=col(Job.idempotency_key).is_not(None),
        )
        .returning(col(Job.id))
    ).first()
    if inserted is None:
        assert idempotency_key is not None  # noqa: S101 - the only conflict there is
        first = find_by_idempotency_key(session, created_by, idempotency_key, spec)
        assert first is not None  # noqa: S101 - it conflicted
        return first, False
    rows = [{"job_id": job_id, **shard.model_dump()} for shard in shards]
    if rows:
        session.execute(insert(Shard), rows)
    if numbers is not None:
        insert_numbers(session, job_id, numbers)
    job = session.get_one(Job, job_id)
    said = f"submitted: {spec.kind} {spec.task} with {resolved.model.label}"
    if resolved.parallelism == "fsdp":
        said += f"; the model in shards (FSDP), {resolved.parallelism_reason}"
    if retry_of is not None:
        said += f"; again for {retry_of}"
    tell(session, job, "submitted", said)
    _tell_of_ids(session, job, resolved)
    wake(session, WAKE_SCHEDULER)
    return job, True


def _tell_of_ids(session: Session, job: Job, resolved: Resolved) -> None:
    found = resolved.inputs["input"].repeated_ids if "input" in resolved.inputs else None
    if found is None:
        return
    some = "one row has" if found.rows == 1 else f"{found.rows} rows have"
    said = f"{some} an id that an earlier row has; the first is row {found.first_row}, {found.first_id}"
    if not found.all:
        said += f" (of the first {found.compared} ids; later ones were not compared)"
    tell(session, job, "notice", said, code="repeated_ids", **found.model_dump())


def new_job_id() -> str:
    return ids.new_id(ids.JOB)
