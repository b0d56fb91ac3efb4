"""Events and logs of a job as server-sent events that can be resumed.

Ids of one job's rows are committed in order (see ``shared/store/guard.py``), so "everything after id
n" is an exact place to go on from: a client that lost the connection sends the last id it saw and
misses nothing and gets nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from sqlmodel import Session
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from scheduler.api.context import Context
from scheduler.api.lookup import find_job
from scheduler.api.views import progress_view
from shared.errors import InvalidRequest, Unavailable
from shared.lifecycle import JobState
from shared.views import EventView, LogView, ProgressView

POLL = 2.0
"""Seconds between looks when no wake-up comes."""
SETTLE = 0.02
"""Seconds to wait after a wake-up, so that a burst of writes is one look."""
PING = 15
Item = EventView | LogView
Reader = Callable[[Session, str, int], Sequence[Item]]


@dataclass(frozen=True, slots=True)
class Look:
    """What there was at one moment."""

    state: JobState
    items: Sequence[Item]
    progress: ProgressView | None


def look(session: Session, job_id: str, after: int, reader: Reader) -> Look:
    """The state is read before the rows: if it is terminal, the rows are all there will be.

    Raises:
        NotFound: there is no such job.
    """
    job = find_job(session, job_id)
    return Look(JobState(job.state), reader(session, job_id, after), progress_view(job))


def start_after(after: int | None, last_event_id: str | None) -> int:
    """Where a stream goes on: ``Last-Event-ID``, else ``?after=``, else the beginning.

    Raises:
        InvalidRequest: the header is no id of a stream.
    """
    if last_event_id:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 19):
            raise InvalidRequest("Last-Event-ID must be a number", param="Last-Event-ID")
        return int(last_event_id)
    return after or 0


async def stream(
    context: Context,
    job_id: str,
    *,
    name: str,
    reader: Reader,
    after: int,
    follow: bool,
    progress: bool = False,
) -> EventSourceResponse:
    """Items after ``after`` as events called ``name``, then ``end`` once the job is over.

    Raises:
        NotFound: there is no such job. Said before the stream starts.
    """
    first = await run_in_threadpool(context.store.call, look, job_id, after, reader)
    body = _events(context, job_id, name, reader, after, first, follow, progress)
    return EventSourceResponse(body, ping=PING, sep="\n")


async def _events(
    context: Context,
    job_id: str,
    name: str,
    reader: Reader,
    after: int,
    now: Look | None,
    follow: bool,
    progress: bool,
) -> AsyncIterator[ServerSentEvent]:
    said: ProgressView | None = None
    with context.wakeups.subscribe(job_id) as woken:
        while not context.wakeups.closing:
            # Cleared before looking: what is committed afterwards sets it again.
            woken.clear()
            if now is None:
                now = await _look_again(context, job_id, after, reader)
            if now is not None:
                for item in now.items:
                    after = item.id
                    yield _event(name, item, str(item.id))
                if progress and now.progress is not None and now.progress != said:
                    said = now.progress
                    yield _event("progress", said)
                seen, now = now, None
                if seen.items:
                    continue
                if seen.state.terminal:
                    yield ServerSentEvent(f'{{"state":"{seen.state}"}}', event="end", sep="\n")
                    return
                if not follow:
                    return
            await wait(woken)


def _event(name: str, item: BaseModel, id: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(item.model_dump_json(), event=name, id=id, sep="\n")


async def _look_again(context: Context, job_id: str, after: int, reader: Reader) -> Look | None:
    """None while Postgres is away: an open stream outlives that."""
    try:
        return await run_in_threadpool(context.store.call, look, job_id, after, reader)
    except Unavailable:
        return None


async def wait(woken: asyncio.Event) -> None:
    """Until a wake-up or the next poll."""
    try:
        await asyncio.wait_for(woken.wait(), POLL)
        await asyncio.sleep(SETTLE)
    except TimeoutError:
        return
