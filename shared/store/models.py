"""Published models: names with versions, pointing at the artifacts of training jobs.

A version number is given once: also after its deletion ``name@3`` never means another model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, func, select

from shared.errors import Conflict, InvalidRequest, NotFound
from shared.lifecycle import JobState
from shared.specs import MODEL_NAME
from shared.store.engine import db_now
from shared.store.guard import lock_job, storable, tell
from shared.tables import Job, PublishedModel

STAGES = ("staging", "production", "archived")
LATEST = "latest"
MAX_TAGS = 50


def publish_model(
    session: Session, job_id: str, name: str, *, tags: Sequence[str] = (), created_by: str = ""
) -> tuple[PublishedModel, bool]:
    """Give the model of a job a name and the next version: (it, whether it is new).

    A job that is published under this name already keeps its version.

    Raises:
        NotFound: no such job. Conflict: it made no model, or has not succeeded.
        InvalidRequest: the name or a tag is none.
    """
    check_name(name)
    check_tags(tags)
    job = lock_job(session, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}", param="job")
    if job.kind != "train" or job.state != JobState.SUCCEEDED:
        raise Conflict(
            f"{job_id} is a {job.kind} job and {job.state}: there is no model to publish",
            param="job",
            hint="Publish a training job that succeeded.",
        )
    return publish_locked(session, job, name, tags=tags, created_by=created_by)


def publish_locked(
    session: Session, job: Job, name: str, *, tags: Sequence[str] = (), created_by: str = ""
) -> tuple[PublishedModel, bool]:
    """The same for a job that is locked and known to have succeeded."""
    # One publisher of a name at a time: two would take the same number.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"model:{name}", 0))))
    known = session.exec(
        select(PublishedModel).where(
            PublishedModel.name == name,
            PublishedModel.job_id == job.id,
            col(PublishedModel.deleted_at).is_(None),
        )
    ).first()
    if known is not None:
        return known, False
    last = session.exec(
        select(func.max(PublishedModel.version)).where(PublishedModel.name == name)
    ).one()
    summary = job.summary or {}
    model = PublishedModel(
        name=name,
        version=(last or 0) + 1,
        job_id=job.id,
        task=job.task,
        metrics=storable(dict(summary.get("metrics") or {})),
        tags=list(dict.fromkeys(tags)),
        created_by=created_by,
    )
    session.add(model)
    session.flush()
    session.refresh(model)
    tell(session, job, "published", f"published as {name}@{model.version}", model=name)
    return model, True


def list_models(
    session: Session, *, after: str | None = None, limit: int = 50
) -> Sequence[PublishedModel]:
    """The newest version of each name, by name. ``after`` is the last name of the page before."""
    newest = (
        select(PublishedModel.name, func.max(PublishedModel.version).label("version"))
        .where(col(PublishedModel.deleted_at).is_(None))
        .group_by(col(PublishedModel.name))
        .subquery()
    )
    query = (
        select(PublishedModel)
        .join(
            newest,
            (col(PublishedModel.name) == newest.c.name)
            & (col(PublishedModel.version) == newest.c.version),
        )
        .order_by(col(PublishedModel.name))
        .limit(limit)
    )
    if after is not None:
        query = query.where(col(PublishedModel.name) > after)
    return session.exec(query).all()


def list_versions(session: Session, name: str) -> Sequence[PublishedModel]:
    """Newest first."""
    return session.exec(
        select(PublishedModel)
        .where(PublishedModel.name == name, col(PublishedModel.deleted_at).is_(None))
        .order_by(col(PublishedModel.version).desc())
    ).all()


def find_model(session: Session, name: str, which: str) -> PublishedModel | None:
    """``which`` is a version number, ``latest``, or a stage (of several the newest)."""
    query = (
        select(PublishedModel)
        .where(PublishedModel.name == name, col(PublishedModel.deleted_at).is_(None))
        .order_by(col(PublishedModel.version).desc())
    )
    if which.isascii() and which.isdigit():
        # What no version can be finds nothing, and does not overflow the column either.
        query = query.where(PublishedModel.version == min(int(which), 2**31 - 1))
    elif which in STAGES:
        query = query.where(PublishedModel.stage == which)
    elif which != LATEST:
        return None
    return session.exec(query).first()


def change_model(
    session: Session,
    name: str,
    version: int,
    *,
    stage: str | None = None,
    tags: Sequence[str] | None = None,
) -> PublishedModel:
    """Move a version to a stage ("" takes it out of any), or replace its tags.

    There is one version of a name in production: the one before is archived by this.

    Raises:
        NotFound: no such version. InvalidRequest: no such stage, or a tag is none.
    """
    if stage not in (None, "", *STAGES):
        raise InvalidRequest(f"stage must be one of {', '.join(STAGES)}, or empty", param="stage")
    if tags is not None:
        check_tags(tags)
    model = _lock(session, name, version)
    if stage == "production":
        session.execute(
            update(PublishedModel)
            .where(
                col(PublishedModel.name) == name,
                col(PublishedModel.stage) == "production",
                col(PublishedModel.version) != version,
            )
            .values(stage="archived")
        )
    changes: dict[str, Any] = {}
    if stage is not None:
        changes["stage"] = stage or None
    if tags is not None:
        changes["tags"] = list(dict.fromkeys(tags))
    for field, value in changes.items():
        setattr(model, field, value)
    session.flush()
    return model


def delete_model(session: Session, name: str, version: int) -> PublishedModel:
    """Take a version off the list. Its files belong to its job and stay.

    Raises:
        NotFound: no such version. Conflict: it is in production.
    """
    model = _lock(session, name, version)
    if model.stage == "production":
        raise Conflict(
            f"{name}@{version} is in production",
            hint="Move another version there first, or take this one out of its stage.",
        )
    model.deleted_at = db_now()  # type: ignore[assignment]
    session.flush()
    return model


def check_name(name: str) -> None:
    """Raises InvalidRequest for what is no model name."""
    if re.fullmatch(MODEL_NAME, name) is None:
        raise InvalidRequest(
            "a model's name has lower-case letters, digits, '.', '_' and '-', 64 at most",
            param="name",
        )


def check_tags(tags: Sequence[str]) -> None:
    """Raises InvalidRequest for what is no tag."""
    if len(tags) > MAX_TAGS or any(not (0 < len(t) <= 100 and t.isprintable()) for t in tags):
        raise InvalidRequest(
            f"tags are {MAX_TAGS} at most, each 1 to 100 printable characters", param="tags"
        )


def _lock(session: Session, name: str, version: int) -> PublishedModel:
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"model:{name}", 0))))
    model = session.exec(
        select(PublishedModel)
        .where(
            PublishedModel.name == name,
            PublishedModel.version == version,
            col(PublishedModel.deleted_at).is_(None),
        )
        .execution_options(populate_existing=True)
    ).first()
    if model is None:
        raise NotFound(
            f"there is no model {name}@{version}", param="name", hint="`gpuyard models` lists them."
        )
    return model
