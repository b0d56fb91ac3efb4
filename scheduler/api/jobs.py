"""Submit, look at and cancel jobs; follow their events and logs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Query, Request, Response
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool

from scheduler.api import examples
from scheduler.api.auth import CallerDep
from scheduler.api.bodies import read_json
from scheduler.api.context import Context, ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import Cursor, JobId, Limit, Text, check_cursor, cut_page, find_job
from scheduler.api.streams import start_after, stream
from scheduler.api.views import event_view, job_detail, job_view, log_view, metric_view
from scheduler.submission import submit
from shared import ids
from shared.errors import InvalidRequest
from shared.lifecycle import JobState
from shared.store import read
from shared.store.cancel import cancel_job
from shared.store.ledger import row_totals
from shared.store.usage import device_seconds
from shared.tables import Job
from shared.views import EventView, JobDetail, JobView, LogView, MetricView, Page

router = APIRouter(tags=["jobs"])
After = Annotated[int | None, Query(ge=0, lt=2**63, description="Only what has a higher id.")]
Follow = Annotated[bool, Query(description="Wait for more until the job is over.")]
Format = Annotated[
    Literal["sse", "json"], Query(description="`json`: a plain list of what there is now.")
]
LastEventId = Annotated[
    str | None, Header(description="What browsers and SSE clients send when they reconnect.")
]
IdempotencyKey = Annotated[
    str | None, Header(description="Makes a repeat of the request return the first job.")
]
_SSE = {"text/event-stream": {"example": examples.EVENT_STREAM}}


SUBMITTED: dict[int | str, dict[str, Any]] = {
    201: {"description": "Accepted.", **examples.JOB_ANSWER},
    200: {
        "model": JobDetail,
        "description": "The idempotency key was used: its job.",
        **examples.JOB_ANSWER,
    },
}
"""What is answered where a job is submitted."""


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobDetail,
    summary="Submit a job",
    responses={**SUBMITTED, **responses(400, 403, 409, 413)},
    openapi_extra={"requestBody": examples.JOB_BODY},
)
async def create_job(
    request: Request,
    response: Response,
    caller: CallerDep,
    context: ContextDep,
    idempotency_key: IdempotencyKey = None,
) -> JobDetail:
    """All of the spec is checked, model and data included, before the job is accepted.

    Data is named by the id of an uploaded file, or by a path that the operator has opened.
    """
    raw = await read_json(request)
    job, created = await run_in_threadpool(
        submit, context.store, context.settings, raw, idempotency_key, caller.key_id
    )
    return await submitted(context, response, job, created)


async def submitted(context: Context, response: Response, job: Job, created: bool) -> JobDetail:
    """The answer where a job is submitted, or was by an earlier request."""
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return await run_in_threadpool(context.store.call, detail_of, job.id)


@router.get("/jobs", summary="List jobs, newest first")
def list_jobs(
    context: ContextDep,
    state: Annotated[list[JobState] | None, Query(description="May be given repeatedly.")] = None,
    kind: Literal["train", "infer"] | None = None,
    name: Text = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[JobView]:
    """One page. New jobs do not shift the pages that follow."""
    rows = context.store.call(
        read.list_jobs,
        states=[str(s) for s in state or ()],
        kind=kind,
        name=name,
        before=check_cursor(cursor, ids.JOB),
        limit=limit + 1,
    )
    page, following = cut_page(rows, limit)
    return Page(items=[job_view(job) for job in page], next=following)


@router.get(
    "/jobs/{job_id}",
    summary="Look at a job",
    responses={200: examples.JOB_ANSWER, **responses(404)},
)
def get_job(job_id: JobId, context: ContextDep) -> JobDetail:
    """With its spec, its attempts, and why it waits or failed."""
    return context.store.call(detail_of, job_id)


@router.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    responses={200: examples.JOB_ANSWER, **responses(404)},
)
def cancel(
    job_id: JobId,
    context: ContextDep,
    reason: Annotated[
        str, Body(embed=True, min_length=1, max_length=500, examples=["wrong data"])
    ] = "by the user",
) -> JobDetail:
    """A job without a running rank is cancelled at once, another becomes `cancelling` and is
    cancelled when its processes are gone. Repeating it, or cancelling a finished job, changes nothing:
    look at `state`."""
    if not reason.isprintable():
        raise InvalidRequest("reason must be one line of text", param="reason")
    context.store.call(find_job, job_id)
    context.store.call(cancel_job, job_id, reason)
    return context.store.call(detail_of, job_id)


@router.get(
    "/jobs/{job_id}/events",
    summary="The story of a job",
    response_model=None,
    responses={200: {"content": _SSE, "model": list[EventView]}, **responses(404)},
)
async def get_events(
    job_id: JobId,
    context: ContextDep,
    after: After = None,
    follow: Follow = True,
    progress: Annotated[
        bool, Query(description="Also send `progress` whenever it changed; these have no id.")
    ] = False,
    format: Format = "sse",
    last_event_id: LastEventId = None,
) -> Any:
    """Server-sent events: `event` with an id for each, and `end` once the job is over and everything
    was sent. After a lost connection, `Last-Event-ID` (or `after`) goes on where it broke off."""
    start = start_after(after, last_event_id)
    if format == "json":
        return await run_in_threadpool(_all_of, context, job_id, _events_after, start)
    return await stream(
        context,
        job_id,
        name="event",
        reader=_events_after,
        after=start,
        follow=follow,
        progress=progress,
    )


@router.get(
    "/jobs/{job_id}/logs",
    summary="What the ranks of a job printed",
    response_model=None,
    responses={200: {"content": _SSE, "model": list[LogView]}, **responses(404)},
)
async def get_logs(
    job_id: JobId,
    context: ContextDep,
    after: After = None,
    follow: Follow = True,
    rank: Annotated[int | None, Query(ge=0, le=100_000, description="Only this rank.")] = None,
    format: Format = "sse",
    last_event_id: LastEventId = None,
) -> Any:
    """As events, with `log` in place of `event`; each carries a piece of text, not a line."""

    def reader(session: Session, job_id: str, after: int) -> list[LogView]:
        return [log_view(c) for c in read.logs_after(session, job_id, after, rank=rank)]

    start = start_after(after, last_event_id)
    if format == "json":
        return await run_in_threadpool(_all_of, context, job_id, reader, start)
    return await stream(context, job_id, name="log", reader=reader, after=start, follow=follow)


@router.get(
    "/jobs/{job_id}/metrics",
    summary="Metrics by step",
    responses=responses(404),
)
def get_metrics(
    job_id: JobId,
    context: ContextDep,
    split: Literal["train", "validation"] | None = None,
) -> Page[MetricView]:
    """In the order of steps, all of them."""
    context.store.call(find_job, job_id)
    rows = context.store.call(read.list_metrics, job_id, split)
    return Page(items=[metric_view(row) for row in rows])


def detail_of(session: Session, job_id: str) -> JobDetail:
    """A job as it is shown. Raises NotFound: there is none of this id."""
    job = find_job(session, job_id)
    attempts = read.list_attempts(session, job_id)
    leases = read.list_leases(session, [a.id for a in attempts])
    totals = row_totals(session, job_id) if job.kind == "infer" else None
    return job_detail(job, attempts, leases, totals, device_seconds(session, job_id))


def _events_after(session: Session, job_id: str, after: int) -> list[EventView]:
    return [event_view(event) for event in read.events_after(session, job_id, after)]


def _all_of(context: Context, job_id: str, reader: Any, after: int) -> list[Any]:
    """Everything there is now, as a plain list."""
    context.store.call(find_job, job_id)
    found: list[Any] = []
    while page := context.store.call(reader, job_id, after):
        found += page
        after = page[-1].id
    return found
