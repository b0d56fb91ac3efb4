"""Step 6 of a batch job: its rows. Every row is in exactly one shard, and every shard is delivered once.

Ranks lease shards for as long as they hold their own lease, compute them and commit them. What a rank
that is gone had leased is open again by that rule alone: nobody has to give it back. A shard whose
engine died is computed alone from then on, and cut in halves when it dies alone, until the row that
kills engines is by itself. All of it is guarded by the holder; None or False means stale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, insert, or_, update
from sqlalchemy import select as sa_select
from sqlalchemy.orm import load_only
from sqlmodel import Session, col, func, select

from shared.lifecycle import LeaseState
from shared.messages import Shard as ShardRange
from shared.rows import pack_results
from shared.store.engine import WAKE_JOB, db_now, wake
from shared.store.guard import Holder, held, tell
from shared.tables import Lease, Shard

_RANGE = (Shard.index, Shard.first_row, Shard.rows, Shard.offset, Shard.length)


@dataclass(frozen=True, slots=True)
class LeasedShard:
    shard: ShardRange
    deaths: int
    """Engines that died while they computed it. Not 0: it is to be computed alone."""


def lease_shards(
    session: Session, holder: Holder, count: int, having: Collection[int] = (), *, idle: bool
) -> list[LeasedShard] | None:
    """The next ``count`` open shards at most, in input order, for this rank alone; None if stale.

    ``having``: the indexes of those that the rank has. Others that are leased to it were given in an
    answer that was lost, and are open to it. ``idle``: whether its engine has nothing else to compute;
    only then it gets a shard in which an engine died, and that one alone.
    """
    if held(session, holder) is None:
        return None
    ranks = select(Lease.rank).where(
        Lease.attempt_id == holder.attempt_id, Lease.state == LeaseState.HELD
    )
    others = [rank for rank in session.exec(ranks).all() if rank != holder.rank]
    query = (
        sa_select(*(col(column) for column in _RANGE), col(Shard.deaths))
        .where(
            col(Shard.job_id) == holder.job_id,
            col(Shard.committed_at).is_(None),
            or_(
                col(Shard.leased_token).is_distinct_from(holder.token),
                col(Shard.leased_rank).not_in(others),
            ),
            col(Shard.index).not_in(having),
        )
        .order_by(col(Shard.first_row))
        .limit(count)
    )
    if not idle:
        query = query.where(col(Shard.deaths) == 0)
    found = [
        LeasedShard(
            ShardRange(index=index, first_row=first, rows=rows, offset=offset, length=length),
            deaths,
        )
        for index, first, rows, offset, length, deaths in session.execute(query)
    ]
    given = list(takewhile(lambda each: not each.deaths, found)) or found[:1]
    if given:
        session.execute(
            update(Shard)
            .where(
                col(Shard.job_id) == holder.job_id,
                col(Shard.index).in_([each.shard.index for each in given]),
            )
            .values(leased_token=holder.token, leased_rank=holder.rank)
        )
    return given


def has_suspects(session: Session, job_id: str) -> bool:
    """Whether an engine died over a shard that is not committed."""
    found = select(Shard.index).where(
        Shard.job_id == job_id, col(Shard.committed_at).is_(None), Shard.deaths > 0
    )
    return session.exec(found.limit(1)).first() is not None


def commit_shard(
    session: Session, holder: Holder, index: int, results: Sequence[dict[str, Any]], seconds: float
) -> bool:
    """Results of a shard, once. One that is committed already stays as it is (and that is well: only
    an earlier, unanswered call can have done it), and one that was cut in halves since is not there
    any more: its halves are computed instead.

    Raises:
        AssertionError: the job has no such shard, or it has another number of rows; a defect.
    """
    rows = held(session, holder)
    if rows is None:
        return False
    shard = session.get(Shard, (holder.job_id, index), options=[load_only(Shard.rows)])  # type: ignore[arg-type]
    if shard is None and index <= _last_index(session, holder.job_id):
        return True
    if shard is None or shard.rows != len(results):
        raise AssertionError(f"{holder.job_id} has no shard {index} of {len(results)} rows")
    rows.attempt.progressed = True
    session.execute(
        update(Shard)
        .where(
            col(Shard.job_id) == holder.job_id,
            col(Shard.index) == index,
            col(Shard.committed_at).is_(None),
        )
        .values(
            attempt_id=holder.attempt_id,
            token=holder.token,
            results=pack_results(results),
            errors=sum(r["error"] is not None for r in results),
            input_tokens=sum(r["usage"]["input_tokens"] for r in results),
            output_tokens=sum(r["usage"]["output_tokens"] for r in results),
            seconds=seconds,
            committed_at=db_now(),
        )
    )
    wake(session, WAKE_JOB, holder.job_id)
    return True


def record_deaths(session: Session, holder: Holder, indexes: Collection[int], how: str) -> bool:
    """The rank's engine died over these shards; ``how`` is for people. They are open again.

    A repeat counts nothing twice: by then the rank leases them no more.
    """
    rows = held(session, holder)
    if rows is None:
        return False
    died = session.execute(
        update(Shard)
        .where(_leased_by(holder), col(Shard.index).in_(indexes))
        .values(deaths=Shard.deaths + 1, leased_token=None, leased_rank=None)
        .returning(col(Shard.index))
    ).all()
    if died:
        tell(
            session, rows.job, "engine_died",
            f"rank {holder.rank}: {how}; a fresh engine computes {len(died)} shards again, each alone",
            attempt=rows.attempt.number, rank=holder.rank, shards=sorted(index for (index,) in died),
        )  # fmt: skip
    return True


def split_shard(
    session: Session, holder: Holder, index: int, at_row: int, at_offset: int, how: str
) -> bool:
    """Cut a shard that the rank's engine died over alone: row ``at_row`` of the input, which begins at
    byte ``at_offset`` of the file, is the first of the second half. A repeat changes nothing.

    Raises:
        AssertionError: the cut is not inside of the shard; a defect.
    """
    rows = held(session, holder)
    if rows is None:
        return False
    whole = session.execute(
        delete(Shard)
        .where(_leased_by(holder), col(Shard.index) == index)
        .returning(*(col(column) for column in _RANGE))
    ).first()
    if whole is None:
        return True
    _, first, count, offset, length = whole
    if not (first < at_row < first + count and offset < at_offset < offset + length):
        raise AssertionError(f"{holder.job_id}: shard {index} is not cut at row {at_row}")
    new = max(_last_index(session, holder.job_id), index) + 1
    halves = [
        (new, first, at_row - first, offset, at_offset - offset),
        (new + 1, at_row, first + count - at_row, at_offset, offset + length - at_offset),
    ]
    names = ("index", "first_row", "rows", "offset", "length")
    values = [dict(zip(names, half, strict=True)) for half in halves]
    session.execute(
        insert(Shard), [{"job_id": holder.job_id, "deaths": 1, **half} for half in values]
    )
    tell(
        session, rows.job, "shard_split",
        f"rank {holder.rank}: {how}; rows {first} to {first + count - 1} are computed in halves",
        attempt=rows.attempt.number, rank=holder.rank, shard=index, halves=[new, new + 1],
    )  # fmt: skip
    return True


def row_totals(session: Session, job_id: str) -> dict[str, int]:
    """What is committed of a batch job: rows, done, errors, input_tokens, output_tokens."""
    done = col(Shard.committed_at).is_not(None)
    sums = {
        "rows": func.sum(Shard.rows),
        "done": func.sum(Shard.rows).filter(done),
        "errors": func.sum(Shard.errors),
        "input_tokens": func.sum(Shard.input_tokens),
        "output_tokens": func.sum(Shard.output_tokens),
    }
    columns = [func.coalesce(total, 0).label(name) for name, total in sums.items()]
    row = session.execute(sa_select(*columns).where(col(Shard.job_id) == job_id)).one()
    return {name: int(value) for name, value in zip(sums, row, strict=True)}


def _leased_by(holder: Holder) -> ColumnElement[bool]:
    return and_(
        col(Shard.job_id) == holder.job_id,
        col(Shard.committed_at).is_(None),
        col(Shard.leased_token) == holder.token,
        col(Shard.leased_rank) == holder.rank,
    )


def _last_index(session: Session, job_id: str) -> int:
    return session.exec(select(func.max(Shard.index)).where(Shard.job_id == job_id)).one() or 0
