"""Committed shards in the two orders in which results are read, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text, tuple_
from sqlmodel import Session, col, select

from shared.tables import Shard


@dataclass(frozen=True, slots=True)
class Completed:
    """A place in the order of completion: behind the shard that was committed then."""

    committed_at: datetime
    first_row: int


def shards_by_row(
    session: Session, job_id: str, after_row: int = -1, limit: int = 4, *, failed: bool = False
) -> Sequence[Shard]:
    """Shards with results that begin behind ``after_row``, in input order; ``failed``: only those with
    rows that have an error."""
    query = (
        select(Shard)
        .where(
            Shard.job_id == job_id,
            col(Shard.committed_at).is_not(None),
            col(Shard.first_row) > after_row,
        )
        .order_by(col(Shard.first_row))
        .limit(limit)
    )
    return session.exec(query.where(col(Shard.errors) > 0) if failed else query).all()


def shards_by_completion(
    session: Session, job_id: str, after: Completed | None = None, limit: int = 4
) -> Sequence[Shard]:
    """Shards with results in the order in which they were committed.

    Commits of a job follow one another under its lock, and the time is taken while it is held: what is
    read here is followed by later ones only.
    """
    place = col(Shard.committed_at), col(Shard.first_row)
    query = select(Shard).where(Shard.job_id == job_id, place[0].is_not(None))
    if after is not None:
        query = query.where(tuple_(*place) > tuple_(after.committed_at, after.first_row))
    return session.exec(query.order_by(*place).limit(limit)).all()


# The last shard of which all rows are among the first so many.
_BEHIND = text(
    "SELECT committed_at, first_row, total FROM ("
    " SELECT committed_at, first_row, sum(rows) OVER (ORDER BY committed_at, first_row) AS total"
    " FROM shards WHERE job_id = :job_id AND committed_at IS NOT NULL) AS done"
    " WHERE total <= :rows ORDER BY total DESC LIMIT 1"
)


def behind_rows(session: Session, job_id: str, rows: int) -> tuple[Completed | None, int]:
    """Where so many rows in the order of completion end: (behind this shard, rows of the next one)."""
    found = session.connection().execute(_BEHIND, {"job_id": job_id, "rows": rows}).first()
    if found is None:
        return None, rows
    return Completed(found.committed_at, found.first_row), rows - int(found.total)
