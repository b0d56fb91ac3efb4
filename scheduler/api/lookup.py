"""Finding what a path names, and checking what a query says, the same way in every route."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path as UrlPath
from fastapi import Query
from sqlmodel import Session

from shared import ids
from shared.errors import InvalidRequest, NotFound
from shared.store import read
from shared.tables import File, Job

JobId = Annotated[str, UrlPath(description="For instance `job_01JD2V5N0W8R4QK7T9Y3ZB6XEM`.")]
FileId = Annotated[str, UrlPath(description="For instance `file_01JD2V5N0W8R4QK7T9Y3ZB6XEM`.")]
Limit = Annotated[int, Query(ge=1, le=500, description="How many at most.")]
Cursor = Annotated[str | None, Query(description="`next` of the page before.")]
Text = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]
"""A filter that Postgres can compare with: it has no NUL in text."""


def find_job(session: Session, job_id: str) -> Job:
    """The job.

    Raises:
        NotFound: there is none of this id.
    """
    job = read.get_job(session, job_id) if ids.is_id(job_id, ids.JOB) else None
    if job is None:
        raise NotFound("there is no such job", param="job_id", hint="`gpuyard jobs` lists them.")
    return job


def find_file(session: Session, file_id: str) -> File:
    """The uploaded file.

    Raises:
        NotFound: there is none of this id.
    """
    file = read.get_file(session, file_id) if ids.is_id(file_id, ids.FILE) else None
    if file is None:
        raise NotFound("there is no such file", param="file_id", hint="`gpuyard files` lists them.")
    return file


def check_cursor(cursor: str | None, prefix: str) -> str | None:
    """The id that a page ended with.

    Raises:
        InvalidRequest: it is no cursor of such a list.
    """
    if cursor is not None and not ids.is_id(cursor, prefix):
        raise InvalidRequest(
            "cursor is none that this list gave", param="cursor", hint="Pass `next` unchanged."
        )
    return cursor


def cut_page(rows: Any, limit: int) -> tuple[list[Any], str | None]:
    """(the page, the cursor of the next) of ``limit + 1`` rows that were asked for."""
    page = list(rows[:limit])
    return page, page[-1].id if len(rows) > limit else None
