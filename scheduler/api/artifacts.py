"""Deliverables of a job, and the download of files in general."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from scheduler.api.context import Context, ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import JobId, find_job
from scheduler.api.views import artifact_view, checkpoint_view
from shared.errors import InvalidRequest, NotFound
from shared.store import read
from shared.views import ArtifactView, CheckpointView, Page

router = APIRouter(tags=["artifacts"])


@router.get(
    "/jobs/{job_id}/checkpoints",
    summary="Committed checkpoints, newest first",
    responses=responses(404),
)
def list_checkpoints(job_id: JobId, context: ContextDep) -> Page[CheckpointView]:
    """What a retry of the job would resume from."""
    context.store.call(find_job, job_id)
    rows = context.store.call(read.list_checkpoints, job_id)
    return Page(items=[checkpoint_view(row) for row in rows])


@router.get(
    "/jobs/{job_id}/artifacts",
    summary="Deliverables of a job that succeeded",
    responses=responses(404),
)
def list_artifacts(job_id: JobId, context: ContextDep) -> Page[ArtifactView]:
    """Empty until the job has succeeded."""
    context.store.call(find_job, job_id)
    rows = context.store.call(read.list_artifacts, job_id)
    return Page(items=[artifact_view(row) for row in rows])


@router.get(
    "/jobs/{job_id}/artifacts/{name:path}",
    response_class=FileResponse,
    summary="Download a deliverable",
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file."},
        206: {"description": "The part that `Range` asked for."},
        304: {"description": "`If-None-Match` names the same content."},
        **responses(404),
    },
)
def download_artifact(job_id: JobId, name: str, request: Request, context: ContextDep) -> Response:
    """`ETag` is the SHA-256 of the file; `Range` works, so a broken download can be resumed."""
    check_name(name)
    context.store.call(find_job, job_id)
    artifact = context.store.call(read.get_artifact, job_id, name)
    if artifact is None:
        raise NotFound(
            f"the job has no artifact '{name}'",
            param="name",
            hint=f"See /v1/jobs/{job_id}/artifacts; there are none until the job has succeeded.",
        )
    return send_file(context, request, artifact.path, artifact.sha256, name.rpartition("/")[2])


def check_name(name: str) -> None:
    """Refuse what is no plain relative name.

    Raises:
        InvalidRequest: empty, absolute, with ``..``, a backslash or a control character.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        raise InvalidRequest(
            "an artifact's name is a relative path without '..'",
            param="name",
            hint="Names are listed at /v1/jobs/<id>/artifacts.",
        )


def send_file(context: Context, request: Request, path: str, sha256: str, name: str) -> Response:
    """A file of the data folder; ``path`` is relative to it.

    Raises:
        NotFound: the row is there and the file is not.
    """
    data = context.settings.data.resolve()
    file = (data / path).resolve()
    if not file.is_relative_to(data) or not file.is_file():
        raise NotFound(f"'{name}' is gone from the data folder", hint="Restore the data folder.")
    _check_range(request.headers.get("range"), file.stat().st_size)
    etag = f'"{sha256}"'
    if request.headers.get("if-none-match") in (etag, "*"):
        return Response(status_code=304, headers={"ETag": etag})
    return FileResponse(
        file, filename=name, media_type="application/octet-stream", headers={"ETag": etag}
    )


def _check_range(header: str | None, size: int) -> None:
    """Refuse what ``FileResponse`` would answer in plain text."""
    if header is None:
        return
    ranges = [re.fullmatch(r"\s*(\d*)-(\d*)\s*", r) for r in header.partition("=")[2].split(",")]
    if not header.startswith("bytes=") or not all(r and (r[1] or r[2]) for r in ranges):
        raise InvalidRequest("Range must look like bytes=0-99", param="Range")
    if any(r and r[1] and not int(r[1]) < size for r in ranges):
        raise HTTPException(
            416, f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
