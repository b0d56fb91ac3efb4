"""Step 6: what a live attempt writes. Each is guarded by the holder; False means stale.

A checkpoint or an artifact counts from the moment its row is committed here, and a stale attempt
cannot make one count. The shards of batch jobs are in ``ledger``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, func, select

from shared import ids
from shared.messages import FileDigest
from shared.store.engine import WAKE_JOB, db_now, wake
from shared.store.guard import Holder, held, storable, tell
from shared.tables import Artifact, Checkpoint, LogChunk, Metric


def record_event(
    session: Session, holder: Holder, type: str, message: str, data: dict[str, Any] | None = None
) -> bool:
    rows = held(session, holder)
    if rows is None:
        return False
    extra = {k: v for k, v in (data or {}).items() if k != "attempt"}
    tell(session, rows.job, type, message, attempt=rows.attempt.number, **extra)
    return True


def record_progress(session: Session, holder: Holder, progress: dict[str, Any]) -> bool:
    """The newest state of the work, for people. Overwrites the one before; of a batch job, whose ranks
    all report, it never goes back."""
    rows = held(session, holder)
    if rows is None:
        return False
    new = {**storable(progress), "attempt": rows.attempt.number}
    if rows.job.kind == "infer":
        new["step"] = max(
            int(new.get("step") or 0), int((rows.job.progress or {}).get("step") or 0)
        )
    rows.job.progress = new
    wake(session, WAKE_JOB, holder.job_id)
    return True


def record_metric(
    session: Session, holder: Holder, split: str, step: int, values: dict[str, float]
) -> bool:
    """Values at a step. A resumed attempt repeats steps and replaces what was said of them. Values
    that are no finite numbers (a loss that diverged) are left out: JSON has none. An evaluation is
    an event as well."""
    rows = held(session, holder)
    if rows is None:
        return False
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    known = session.get(Metric, (holder.job_id, split, step), populate_existing=True)
    # Else it is the repeat of a call whose answer was lost.
    if split == "validation" and (known is None or known.attempt != rows.attempt.number):
        said = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in finite.items())
        tell(
            session, rows.job, "evaluation", f"validation at step {step}: {said}",
            attempt=rows.attempt.number, step=step, values=finite,
        )  # fmt: skip
    new = {"attempt": rows.attempt.number, "values": finite, "at": db_now()}
    session.execute(
        pg_insert(Metric)
        .values(job_id=holder.job_id, split=split, step=step, **new)
        .on_conflict_do_update(index_elements=["job_id", "split", "step"], set_=new)
    )
    wake(session, WAKE_JOB, holder.job_id)
    return True


def append_log(session: Session, holder: Holder, text: str) -> bool:
    """What the rank printed since the last time. Also accepted after a cancel: it explains it."""
    rows = held(session, holder)
    if rows is None:
        return False
    number = rows.attempt.number
    chunk = LogChunk(job_id=holder.job_id, attempt=number, rank=holder.rank, text=storable(text))
    session.add(chunk)
    wake(session, WAKE_JOB, holder.job_id)
    return True


def commit_checkpoint(
    session: Session,
    holder: Holder,
    step: int,
    path: str,
    manifest: dict[str, FileDigest],
    best_step: int | None = None,
) -> bool:
    """Makes a finished checkpoint folder count. ``path`` is relative to the data folder, and
    ``best_step`` is the step of the best model up to here, where training asks for one."""
    rows = held(session, holder)
    if rows is None:
        return False
    size = sum(file.size for file in manifest.values())
    new = session.execute(
        pg_insert(Checkpoint)
        .values(
            id=ids.new_id(ids.CHECKPOINT),
            job_id=holder.job_id,
            attempt_id=holder.attempt_id,
            token=holder.token,
            step=step,
            path=path,
            manifest={name: file.model_dump() for name, file in manifest.items()},
            size=size,
            best_step=best_step,
        )
        .on_conflict_do_nothing(index_elements=["attempt_id", "step"])
        .returning(col(Checkpoint.id))
    ).first()
    if new is not None:  # else it is the repeat of a call whose answer was lost
        if step > _furthest_before(session, holder):
            rows.attempt.progressed = True
        best = best_step == step
        tell(
            session, rows.job, "checkpoint",
            f"checkpoint at step {step}" + (", the best model so far" if best else ""),
            attempt=rows.attempt.number, step=step, size=size, best=best,
        )  # fmt: skip
    return True


def _furthest_before(session: Session, holder: Holder) -> int:
    """The furthest checkpoint of the attempts before this one (retention keeps the job's furthest);
    -1 without any. One that is damaged counts: an attempt that computes again what an earlier one had
    saved, and fails, has not brought the job on."""
    furthest = session.exec(
        select(func.max(Checkpoint.step)).where(
            Checkpoint.job_id == holder.job_id, Checkpoint.attempt_id != holder.attempt_id
        )
    ).one()
    return -1 if furthest is None else furthest


def forget_checkpoints(session: Session, holder: Holder, keep: int) -> Sequence[str] | None:
    """Drop the rows of the checkpoints that nobody needs any more (``_needed``); the paths to delete
    afterwards.

    Rows go first: a row without its folder would be a promise that cannot be kept.
    """
    if held(session, holder) is None:
        return None
    newest_first = session.exec(
        select(Checkpoint)
        .where(Checkpoint.job_id == holder.job_id)
        .order_by(col(Checkpoint.step).desc(), col(Checkpoint.token).desc())
    ).all()
    needed = _needed(newest_first, keep, holder.attempt_id)
    old = [checkpoint for checkpoint in newest_first if checkpoint.id not in needed]
    for checkpoint in old:
        session.delete(checkpoint)
    return [checkpoint.path for checkpoint in old]


def _needed(newest_first: Sequence[Checkpoint], keep: int, attempt_id: str) -> set[str]:
    """Ids of the ``keep`` newest, of the newest of the attempt that runs, and of the best models that
    these build on.

    The attempt's own newest is not among the newest where it skipped damaged ones and began further
    back.
    """
    own = [checkpoint for checkpoint in newest_first if checkpoint.attempt_id == attempt_id]
    kept = [*newest_first[:keep], *own[:1]]
    build_on = {checkpoint.best_step for checkpoint in kept}
    best = [each for each in newest_first if each.best and each.step in build_on]
    return {checkpoint.id for checkpoint in (*kept, *best)}


def record_artifact(
    session: Session, holder: Holder, *, name: str, kind: str, path: str, size: int, sha256: str
) -> bool:
    """A finished deliverable; ``path`` is relative to the data folder. Visible with success."""
    if held(session, holder) is None:
        return False
    new = {"kind": kind, "path": path, "size": size, "sha256": sha256}
    session.execute(
        pg_insert(Artifact)
        .values(
            id=ids.new_id(ids.ARTIFACT),
            job_id=holder.job_id,
            attempt_id=holder.attempt_id,
            token=holder.token,
            name=name,
            **new,
        )
        .on_conflict_do_update(index_elements=["attempt_id", "name"], set_=new)
    )
    return True
