"""Run a job again, or its rows that failed."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from scheduler.api.auth import CallerDep
from scheduler.api.context import ContextDep
from scheduler.api.errors import responses
from scheduler.api.jobs import SUBMITTED, IdempotencyKey, submitted
from scheduler.api.lookup import JobId, find_job
from scheduler.submission import retry
from shared.views import JobDetail

router = APIRouter(tags=["jobs"])


class RetryBody(BaseModel):
    """What is to be run again, and what is to be different."""

    model_config = ConfigDict(extra="forbid")

    failed: bool = Field(
        False, description="Of a batch job: only the rows that have an error, with their numbers."
    )
    changes: dict[str, Any] = Field(
        {},
        description="Laid over the spec as a JSON merge patch; null takes a field away.",
        examples=[{"generation": {"max_new_tokens": 256}}],
    )


@router.post(
    "/jobs/{job_id}/retry",
    status_code=201,
    response_model=JobDetail,
    summary="Run a job again",
    responses={**SUBMITTED, **responses(403, 404, 409)},
)
async def retry_job(
    job_id: JobId,
    response: Response,
    caller: CallerDep,
    context: ContextDep,
    body: RetryBody | None = None,
    idempotency_key: IdempotencyKey = None,
) -> JobDetail:
    """A new job of the same spec, with changes; its `retry_of` names the one that it runs again. Both
    that one and its results stay as they are.

    With `failed` it has only the rows that failed, and its results carry the numbers that these had in
    the first input. Refused while the job is not over, and where no row failed.
    """
    asked = body or RetryBody()
    first = await run_in_threadpool(context.store.call, find_job, job_id)
    job, created = await run_in_threadpool(
        retry,
        context.store,
        context.settings,
        first,
        failed=asked.failed,
        changes=asked.changes,
        idempotency_key=idempotency_key,
        created_by=caller.key_id,
    )
    return await submitted(context, response, job, created)
