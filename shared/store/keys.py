"""API keys and uploaded files."""

from __future__ import annotations

import hashlib
import re

from sqlalchemy import update
from sqlmodel import Session, col, select

from shared import ids
from shared.errors import InvalidRequest
from shared.store.engine import db_now
from shared.tables import ApiKey, File
from shared.tables.submission import DEFAULT_PROJECT

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(session: Session, name: str, project: str = DEFAULT_PROJECT) -> tuple[str, str]:
    """(id, key). The key is shown this once; only its hash is kept.

    Raises:
        InvalidRequest: ``project`` is no name.
    """
    if not _PROJECT.fullmatch(project):
        raise InvalidRequest(
            f"'{project[:80]}' is no name of a project",
            param="project",
            hint="1 to 64 letters, digits, '.', '_' and '-', a letter or digit first.",
        )
    key, id = ids.new_secret(), ids.new_id(ids.KEY)
    session.add(ApiKey(id=id, name=name, project=project, sha256=_digest(key)))
    return id, key


def find_key(session: Session, key: str) -> ApiKey | None:
    """The unrevoked key, or None. Found by its hash, so timing tells nothing about keys."""
    row = select(ApiKey).where(ApiKey.sha256 == _digest(key), col(ApiKey.revoked_at).is_(None))
    return session.exec(row).first()


def revoke_key(session: Session, id: str) -> bool:
    revoked = session.execute(
        update(ApiKey)
        .where(col(ApiKey.id) == id, col(ApiKey.revoked_at).is_(None))
        .values(revoked_at=db_now())
        .returning(col(ApiKey.id))
    ).first()
    return revoked is not None


def list_keys(session: Session) -> list[ApiKey]:
    return list(session.exec(select(ApiKey).order_by(col(ApiKey.id))).all())


def insert_file(
    session: Session,
    *,
    id: str,
    name: str,
    size: int,
    sha256: str,
    path: str,
    created_by: str | None,
) -> File:
    """A complete upload. ``path`` is relative to the data folder."""
    file = File(id=id, name=name, size=size, sha256=sha256, path=path, created_by=created_by)
    session.add(file)
    session.flush()
    session.refresh(file)
    return file
