"""Leadership of the scheduler: one row, an expiring lease, and a term that fences an old leader."""

from __future__ import annotations

from sqlalchemy import Integer, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlmodel import Session, col, select

from shared.store.engine import after, db_now
from shared.tables import Leader

_NAME = "scheduler"


def lead(session: Session, holder: str, ttl: float) -> int | None:
    """Become or stay the leader for ``ttl`` seconds: the term, or None while another one leads.

    The term rises when the leader changes, so a leader that slept past its lease finds its term gone.
    """
    row = session.execute(
        pg_insert(Leader)
        .values(name=_NAME, holder=holder, term=1, expires_at=after(ttl))
        .on_conflict_do_update(
            index_elements=["name"],
            set_={
                "holder": holder,
                "term": Leader.term + (col(Leader.holder) != holder).cast(Integer),
                "expires_at": after(ttl),
            },
            where=(col(Leader.holder) == holder) | (col(Leader.expires_at) < db_now()),
        )
        .returning(col(Leader.term))
    ).first()
    return None if row is None else int(row[0])


def leads(session: Session, term: int) -> bool:
    """Whether ``term`` is still the one that decides; locks it for the rest of the transaction, so
    that no other scheduler can take over between this check and the commit."""
    row = session.exec(
        select(Leader.term)
        .where(Leader.name == _NAME, col(Leader.expires_at) > db_now())
        .with_for_update(read=True)
    ).first()
    return row == term


def resign(session: Session, holder: str) -> None:
    """Let another one lead at once."""
    session.execute(
        update(Leader)
        .where(col(Leader.name) == _NAME, col(Leader.holder) == holder)
        .values(expires_at=db_now(), holder="")
    )
