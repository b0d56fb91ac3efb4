"""Rows of a batch job in both orders as they are committed, and as one Parquet file.

Parquet is made here and not by the client: pyarrow is installed where files are read, which the client
does without.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Protocol

from sqlmodel import Session
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from scheduler.api.context import Context
from scheduler.api.lookup import find_job
from scheduler.api.streams import PING, wait
from shared.errors import InvalidRequest, Unavailable
from shared.lifecycle import JobState
from shared.rows import renumber, unpack_results
from shared.store.read import committed_shards
from shared.store.results import Completed, behind_rows, shards_by_completion, shards_by_row
from shared.store.retried import numbers_of
from shared.tables import Shard

PARQUET = "application/vnd.apache.parquet"
AT_ONCE = 4
"""Shards held in memory at a time, in input order."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The results of one job, being read."""

    context: Context
    job_id: str
    numbered: bool
    """Rows have numbers that are not their own (``shared.store.retried``)."""

    def lines(self, shard: Shard, skipped: int = 0) -> bytes:
        """A shard's results as JSONL, without the first ``skipped``."""
        text = unpack_results(shard.results or b"")
        if skipped:
            text = b"".join(text.splitlines(keepends=True)[skipped:])
        if not self.numbered:
            return text
        first, rows = shard.first_row + skipped, shard.rows - skipped
        return renumber(text, self.context.store.call(numbers_of, self.job_id, first, rows))


def refuse_contradiction(format: str, order: str, after_row: int, skip: int, follow: bool) -> None:
    """Raises InvalidRequest."""
    if format == "parquet" and (follow or order != "input" or after_row >= 0):
        raise InvalidRequest(
            "a Parquet file is of what is committed, in input order: follow, order and after_row do not "
            "go with it",
            param="format",
            hint="Wait for the job's end, or take format=jsonl.",
        )
    if skip and order != "completion":
        raise InvalidRequest(
            "skip counts rows in the order of completion",
            param="skip",
            hint="In input order after_row says where to go on; or ask for order=completion.",
        )
    if after_row >= 0 and order == "completion":
        raise InvalidRequest(
            "after_row is a place in input order",
            param="after_row",
            hint="With order=completion, skip as many rows as have arrived.",
        )


class Place(Protocol):
    """Where in an order the reader of results is."""

    def following(self, session: Session, over: bool) -> list[Shard]:
        """The next shards, if any may be delivered; ``over``: there will be no others."""

    def take(self, shard: Shard) -> bytes:
        """What is delivered of the next shard; the place is behind it then."""


class InputOrder:
    """See :class:`Place`.

    Args:
        after_row: the last row that the reader has.
        gapless: only what has no gap before it, which may still be filled.
    """

    def __init__(self, reading: Reading, after_row: int, *, gapless: bool) -> None:
        self._reading = reading
        self._after_row = after_row
        self._gapless = gapless

    def following(self, session: Session, over: bool) -> list[Shard]:
        after_row = self._after_row
        shards = list(committed_shards(session, self._reading.job_id, after_row, AT_ONCE))
        if not self._gapless or over:
            return shards
        whole: list[Shard] = []
        for shard in shards:
            if shard.first_row > after_row + 1:
                break
            whole.append(shard)
            after_row = shard.first_row + shard.rows - 1
        return whole

    def take(self, shard: Shard) -> bytes:
        skipped = max(0, self._after_row + 1 - shard.first_row)
        self._after_row = shard.first_row + shard.rows - 1
        return self._reading.lines(shard, skipped)


class CompletionOrder:
    """See :class:`Place`.

    Args:
        skip: as many rows as the reader has.
    """

    def __init__(self, reading: Reading, skip: int) -> None:
        self._reading = reading
        self._skip = skip
        self._begun = False
        self._after: Completed | None = None

    def following(self, session: Session, over: bool) -> list[Shard]:  # noqa: ARG002
        if not self._begun:
            self._after, self._skip = behind_rows(session, self._reading.job_id, self._skip)
            self._begun = True
        return list(shards_by_completion(session, self._reading.job_id, self._after))

    def take(self, shard: Shard) -> bytes:
        assert shard.committed_at is not None  # noqa: S101 - it was selected by that
        self._after = Completed(shard.committed_at, shard.first_row)
        skipped, self._skip = self._skip, 0
        return self._reading.lines(shard, skipped)


async def deliver(reading: Reading, place: Place, follow: bool) -> AsyncIterator[bytes]:
    """Results from a place on; with ``follow`` until the job is over. A blank line now and then keeps the
    connection alive."""
    context, job_id = reading.context, reading.job_id
    sent_at = time.monotonic()
    with context.wakeups.subscribe(job_id) as woken:
        while not context.wakeups.closing:
            woken.clear()
            try:
                over, shards = await run_in_threadpool(context.store.call, _next, job_id, place)
            except Unavailable:
                if not follow:
                    raise
                over, shards = False, []
            for shard in shards:
                yield await run_in_threadpool(place.take, shard)
                sent_at = time.monotonic()
            if shards:
                continue
            if over or not follow:
                return
            if time.monotonic() - sent_at > PING:
                yield b"\n"
                sent_at = time.monotonic()
            await wait(woken)


def _next(session: Session, job_id: str, place: Place) -> tuple[bool, list[Shard]]:
    """(whether the job is over, shards from the place on). The state is read first: if it is terminal, the
    shards are all there will be."""
    over = JobState(find_job(session, job_id).state).terminal
    return over, place.following(session, over)


def parquet_file(reading: Reading, task: str) -> AsyncIterator[bytes]:
    """What is committed, in input order, a row group at a time."""
    # pyarrow takes a while and some 60 MB: only who asks for such a file pays for it.
    from shared.result_file import parquet_pieces

    return iterate_in_threadpool(parquet_pieces(task, _blocks(reading)))


def _blocks(reading: Reading) -> Iterator[bytes]:
    after = -1
    while shards := reading.context.store.call(shards_by_row, reading.job_id, after):
        for shard in shards:
            after = shard.first_row
            yield reading.lines(shard)
