"""Sweeps: their trials are jobs, submitted together or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, select

from shared import ids
from shared.errors import IdempotencyMismatch
from shared.messages import Shard
from shared.resolved import Resolved
from shared.store.submit import insert_job, new_job_id
from shared.sweeps import SweepSpec, Trial
from shared.tables import Job, Sweep, SweepTrial


@dataclass(frozen=True, slots=True)
class TrialRow:
    trial: SweepTrial
    job: Job


def find_sweep_by_key(session: Session, created_by: str, key: str, spec: SweepSpec) -> Sweep | None:
    """The sweep that this idempotency key made, if any.

    Raises:
        IdempotencyMismatch: the key made a sweep of another spec.
    """
    sweep = session.exec(
        select(Sweep).where(Sweep.created_by == created_by, Sweep.idempotency_key == key)
    ).first()
    if sweep is not None and sweep.spec_sha256 != _digest(spec):
        raise IdempotencyMismatch(
            f"the idempotency key was used for {sweep.id}, which has another spec",
            param="Idempotency-Key",
            hint="Use a new key for a new sweep.",
        )
    return sweep


def insert_sweep(
    session: Session,
    spec: SweepSpec,
    trials: Sequence[tuple[Trial, Resolved, tuple[Shard, ...]]],
    *,
    idempotency_key: str | None = None,
    created_by: str = "",
) -> tuple[Sweep, bool]:
    """Insert a sweep with the jobs of its trials; with a used key, the first sweep. (it, whether new).

    Raises:
        IdempotencyMismatch: the key made a sweep of another spec.
    """
    sweep_id = ids.new_id(ids.SWEEP)
    # As with jobs: of two requests with one key the second waits here, and finds the first's.
    inserted = session.execute(
        pg_insert(Sweep)
        .values(
            id=sweep_id,
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            spec_sha256=_digest(spec),
            idempotency_key=idempotency_key,
            created_by=created_by,
        )
        .on_conflict_do_nothing(
            index_elements=["created_by", "idempotency_key"],
            index_where=col(Sweep.idempotency_key).is_not(None),
        )
        .returning(col(Sweep.id))
    ).first()
    if inserted is None:
        assert idempotency_key is not None  # noqa: S101 - the only conflict there is
        first = find_sweep_by_key(session, created_by, idempotency_key, spec)
        assert first is not None  # noqa: S101 - it conflicted
        return first, False
    for trial, resolved, shards in trials:
        job, _ = insert_job(
            session,
            job_id=new_job_id(),
            spec=trial.spec,
            resolved=resolved,
            shards=shards,
            created_by=created_by,
        )
        session.add(
            SweepTrial(
                sweep_id=sweep_id,
                number=trial.number,
                job_id=job.id,
                parameters=trial.parameters,
            )
        )
    session.flush()
    return session.get_one(Sweep, sweep_id), True


def get_sweep(session: Session, sweep_id: str) -> Sweep | None:
    return session.get(Sweep, sweep_id)


def list_sweeps(session: Session, *, before: str | None = None, limit: int = 50) -> Sequence[Sweep]:
    """Newest first."""
    query = select(Sweep).order_by(col(Sweep.id).desc()).limit(limit)
    if before is not None:
        query = query.where(col(Sweep.id) < before)
    return session.exec(query).all()


def list_trials(session: Session, sweep_ids: Sequence[str]) -> list[TrialRow]:
    """With their jobs, by sweep and number."""
    rows = session.exec(
        select(SweepTrial, Job)
        .join(Job, col(Job.id) == col(SweepTrial.job_id))
        .where(col(SweepTrial.sweep_id).in_(sweep_ids))
        .order_by(col(SweepTrial.sweep_id), col(SweepTrial.number))
    ).all()
    return [TrialRow(trial, job) for trial, job in rows]


def _digest(spec: SweepSpec) -> str:
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
