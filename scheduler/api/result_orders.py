"""Rows of a batch job as they come, and as one Parquet file.

Parquet is made here and not by the client: pyarrow is installed where files are read, which the client
does without.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from sqlmodel import Session
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from scheduler.api.context import Context
from scheduler.api.lookup import find_job
from scheduler.api.streams import PING, wait
from shared.errors import InvalidRequest, Unavailable
from shared.lifecycle import JobState
from shared.rows import renumber, unpack_results
from shared.store.results import Completed, behind_rows, shards_by_completion, shards_by_row
from shared.store.retried import numbers_of
from shared.tables import Shard

PARQUET = "application/vnd.apache.parquet"


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


async def rows_as_they_come(reading: Reading, skip: int, follow: bool) -> AsyncIterator[bytes]:
    """Results in the order of completion, without the first ``skip``; with ``follow`` until the job is
    over. A blank line now and then keeps the connection alive."""
    context, job_id = reading.context, reading.job_id
    store = context.store
    after, skipped = await run_in_threadpool(store.call, behind_rows, job_id, skip)
    sent_at = time.monotonic()
    with context.wakeups.subscribe(job_id) as woken:
        while not context.wakeups.closing:
            woken.clear()
            try:
                over, shards = await run_in_threadpool(store.call, _next, job_id, after)
            except Unavailable:
                if not follow:
                    raise
                over, shards = False, []
            for shard in shards:
                assert shard.committed_at is not None  # noqa: S101 - it was selected by that
                after = Completed(shard.committed_at, shard.first_row)
                yield await run_in_threadpool(reading.lines, shard, skipped)
                skipped = 0
                sent_at = time.monotonic()
            if shards:
                continue
            if over or not follow:
                return
            if time.monotonic() - sent_at > PING:
                yield b"\n"
                sent_at = time.monotonic()
            await wait(woken)


def _next(session: Session, job_id: str, after: Completed | None) -> tuple[bool, list[Shard]]:
    """(whether the job is over, shards behind ``after``). The state is read first: if it is terminal,
    the shards are all there will be."""
    over = JobState(find_job(session, job_id).state).terminal
    return over, list(shards_by_completion(session, job_id, after))


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
