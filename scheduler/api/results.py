"""The results of a batch job, out of its committed shards: what may be asked for. How they are delivered is in
``result_orders.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from scheduler.api.context import ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import JobId, find_job
from scheduler.api.result_orders import (
    PARQUET,
    CompletionOrder,
    InputOrder,
    Place,
    Reading,
    deliver,
    parquet_file,
    refuse_contradiction,
)
from shared.errors import InvalidRequest
from shared.lifecycle import JobState
from shared.store.ledger import row_totals
from shared.store.retried import is_numbered, rows_up_to

router = APIRouter(tags=["results"])
_EXAMPLE = (
    '{"row":0,"id":null,"output":{"label":"person","score":0.97,"labels":[{"label":"person",'
    '"score":0.97}]},"error":null,"usage":{"input_tokens":12,"output_tokens":0,"device_seconds":0.0031}}\n'
)
_OUTPUTS = """`output` is, by task:

| task | output |
| --- | --- |
| `text-classification` | `{"label", "score", "labels": [{"label", "score"}, …]}` |
| `token-classification` | of words `{"tags": […], "scores": […], "entities": […]}`, of a text `{"entities": […]}`; \
an entity is `{"label", "score", "start", "end", "text"}`, counted in words or in characters |
| `fill-mask` | `{"masks": [{"tokens": [{"token", "score"}, …]}, …], "text"}` |
| `scoring` | `{"logprob", "tokens", "mean", "perplexity"}`, with `token_logprobs` also \
`{"token_logprobs": [{"token", "id", "logprob"}, …]}` |
| `reranking` | of `documents` `{"scores": […], "ranking": […]}`, the ranking of their places, best first; of a \
`text` `{"score"}` |
| `embeddings` | `{"embedding": […], "dimensions"}`; with `encoding: base64` the embedding is a string: \
float32 numbers, little-endian |
| `text-generation`, `text2text`, `summarization` | `{"text", "finish_reason"}`: `stop` or `length` |

A row that was too long and was split (`too_long`) also has `windows`, how many there were.
"""


@router.get(
    "/jobs/{job_id}/results",
    response_class=StreamingResponse,
    summary="Rows of a batch job as JSONL",
    responses={
        200: {
            "content": {"application/x-ndjson": {"example": _EXAMPLE}, PARQUET: {}},
            "description": "One result a line. " + _OUTPUTS,
            "headers": {
                "X-Rows-Total": {
                    "description": "Rows of the input.",
                    "schema": {"type": "integer"},
                },
                "X-Rows-Done": {
                    "description": "Rows committed when the answer began.",
                    "schema": {"type": "integer"},
                },
                "X-Row-Errors": {
                    "description": "Rows of those that have an error.",
                    "schema": {"type": "integer"},
                },
                "X-Job-State": {"schema": {"type": "string"}},
            },
        },
        **responses(404),
    },
)
async def get_results(
    job_id: JobId,
    context: ContextDep,
    after_row: Annotated[
        int,
        Query(
            ge=-1,
            lt=2**63,
            description="Only rows with a higher number: resumes a broken stream.",
        ),
    ] = -1,
    follow: Annotated[bool, Query(description="Wait for more rows until the job is over.")] = False,
    order: Annotated[
        Literal["input", "completion"], Query(description="Rows as in the input, or as they come.")
    ] = "input",
    skip: Annotated[
        int,
        Query(
            ge=0,
            lt=2**63,
            description="With `order=completion`: without so many, which one has already.",
        ),
    ] = 0,
    format: Annotated[
        Literal["jsonl", "parquet"],
        Query(description="`parquet`: one file, of what is committed now, in input order."),
    ] = "jsonl",
) -> StreamingResponse:
    """What is committed, also while the job runs; rows appear shard by shard.

    With `follow` the rows come without gaps, as they are finished, until the job is over; a blank
    line now and then keeps the connection alive. Without
    it, everything that is committed now; shards that are still computed are then missing, so compare
    `X-Rows-Done` with `X-Rows-Total`. A result never changes once it was delivered.

    In the order of completion rows come shard by shard as these are committed, and the order never
    changes: `skip` goes on behind as many rows as have arrived.
    """
    refuse_contradiction(format, order, after_row, skip, follow)
    start = await run_in_threadpool(context.store.call, _begin, job_id, after_row)
    headers = {
        "X-Rows-Total": str(start.totals["rows"]),
        "X-Rows-Done": str(start.totals["done"]),
        "X-Row-Errors": str(start.totals["errors"]),
        "X-Job-State": start.state,
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
    }
    reading = Reading(context, job_id, start.numbered)
    if format == "parquet":
        headers["Content-Disposition"] = f'attachment; filename="{job_id}.parquet"'
        body = parquet_file(reading, start.task)
        return StreamingResponse(body, media_type=PARQUET, headers=headers)
    place: Place = InputOrder(reading, start.after_row, gapless=follow)
    if order == "completion":
        place = CompletionOrder(reading, skip)
    body = deliver(reading, place, follow)
    return StreamingResponse(body, media_type="application/x-ndjson", headers=headers)


@dataclass(frozen=True, slots=True)
class _Start:
    state: JobState
    task: str
    totals: dict[str, int]
    numbered: bool
    """Its rows have the numbers of another job's."""
    after_row: int
    """As the job itself counts."""


def _begin(session: Session, job_id: str, after_row: int) -> _Start:
    job = find_job(session, job_id)
    if job.kind != "infer":
        raise InvalidRequest(
            "a training job has no rows",
            param="job_id",
            hint="See its metrics and artifacts instead.",
        )
    numbered = is_numbered(session, job_id)
    if numbered:
        after_row = rows_up_to(session, job_id, after_row) - 1
    totals = row_totals(session, job_id)
    return _Start(JobState(job.state), job.task, totals, numbered, after_row)
