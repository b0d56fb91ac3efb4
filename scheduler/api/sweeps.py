"""Hyperparameter sweeps: submit, look at, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi import Path as UrlPath
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool

from scheduler.api import examples
from scheduler.api.auth import CallerDep
from scheduler.api.bodies import read_json
from scheduler.api.context import ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import Cursor, Limit, check_cursor, cut_page
from scheduler.api.views import sweep_detail
from scheduler.submission import submit_sweep
from shared import ids
from shared.errors import NotFound
from shared.store import sweeps
from shared.store.cancel import cancel_job
from shared.views import Page, SweepDetail, SweepView

router = APIRouter(tags=["sweeps"])
SweepId = Annotated[str, UrlPath(description="For instance `swp_01JD2V5N0W8R4QK7T9Y3ZB6XEM`.")]


@router.post(
    "/sweeps",
    status_code=201,
    response_model=SweepDetail,
    summary="Submit a sweep",
    responses={
        200: {"model": SweepDetail, "description": "The idempotency key was used: its sweep."},
        **responses(400, 403, 409, 413),
    },
    openapi_extra={"requestBody": examples.SWEEP_BODY},
)
async def create_sweep(
    request: Request,
    response: Response,
    caller: CallerDep,
    context: ContextDep,
    idempotency_key: Annotated[
        str | None, Header(description="Makes a repeat of the request return the first sweep.")
    ] = None,
) -> SweepDetail:
    """A training spec, and the fields that differ from trial to trial. All trials are checked before
    any is accepted; each is a job of its own."""
    raw = await read_json(request)
    sweep, created = await run_in_threadpool(
        submit_sweep, context.store, context.settings, raw, idempotency_key, caller.key_id
    )
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/sweeps/{sweep.id}"
    return await run_in_threadpool(context.store.call, _detail, sweep.id)


@router.get("/sweeps", summary="List sweeps, newest first")
def list_sweeps(context: ContextDep, cursor: Cursor = None, limit: Limit = 50) -> Page[SweepView]:
    """One page, with how the trials stand."""
    before = check_cursor(cursor, ids.SWEEP)

    def read(session: Session) -> tuple[list[SweepView], str | None]:
        rows = sweeps.list_sweeps(session, before=before, limit=limit + 1)
        page, following = cut_page(rows, limit)
        trials = sweeps.list_trials(session, [sweep.id for sweep in page])
        views: list[SweepView] = [
            sweep_detail(sweep, [t for t in trials if t.trial.sweep_id == sweep.id])
            for sweep in page
        ]
        return views, following

    items, following = context.store.call(read)
    return Page(items=items, next=following)


@router.get("/sweeps/{sweep_id}", summary="Look at a sweep", responses=responses(404))
def get_sweep(sweep_id: SweepId, context: ContextDep) -> SweepDetail:
    """Its trials with their metrics, and the best of those that have succeeded."""
    return context.store.call(_detail, sweep_id)


@router.post("/sweeps/{sweep_id}/cancel", summary="Cancel a sweep", responses=responses(404))
def cancel(sweep_id: SweepId, context: ContextDep) -> SweepDetail:
    """Cancels every trial that is not over. Repeating it changes nothing."""
    for trial in context.store.call(_detail, sweep_id).trials:
        if not trial.state.terminal:
            context.store.call(cancel_job, trial.job_id, "its sweep was cancelled")
    return context.store.call(_detail, sweep_id)


def _detail(session: Session, sweep_id: str) -> SweepDetail:
    sweep = sweeps.get_sweep(session, sweep_id) if ids.is_id(sweep_id, ids.SWEEP) else None
    if sweep is None:
        raise NotFound(
            "there is no such sweep", param="sweep_id", hint="`gpuyard sweeps` lists them."
        )
    return sweep_detail(sweep, sweeps.list_trials(session, [sweep.id]))
