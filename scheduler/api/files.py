"""Uploaded files."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from scheduler.api import examples
from scheduler.api.artifacts import send_file
from scheduler.api.auth import CallerDep
from scheduler.api.context import ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import Cursor, FileId, Limit, check_cursor, cut_page, find_file
from scheduler.api.uploads import discard, receive_file
from scheduler.api.views import file_view
from shared import ids
from shared.errors import Unavailable
from shared.store import read
from shared.store.keys import insert_file
from shared.views import FileView, Page

router = APIRouter(tags=["files"])


@router.post(
    "/files",
    status_code=201,
    summary="Upload a file",
    responses=responses(400, 413),
    openapi_extra={"requestBody": examples.FILE_BODY},
)
async def upload_file(
    request: Request,
    caller: CallerDep,
    context: ContextDep,
    name: Annotated[str | None, Query(description="What the file is called.")] = None,
    x_content_sha256: Annotated[  # noqa: ARG001 - read from the request; here for the documentation
        str | None, Header(description="Refuses the upload unless the content has this SHA-256.")
    ] = None,
) -> FileView:
    """As the one file of a multipart form, or as the plain body with `?name=`. Streamed to disk; an
    upload that breaks off leaves nothing."""
    received = await receive_file(request, context.settings, name)
    try:
        file = await run_in_threadpool(
            context.store.call,
            insert_file,
            id=received.id,
            name=received.name,
            size=received.size,
            sha256=received.sha256,
            path=received.path,
            created_by=caller.key_id,
        )
    except Unavailable:
        # Whether the row is in is unknown, and a row without its file is worse than the reverse.
        raise
    except Exception:
        # Whatever else refused the row, it is not in, and nobody would ever name the file.
        discard(context.settings, received)
        raise
    return file_view(file)


@router.get("/files", summary="List files, newest first")
def list_files(context: ContextDep, cursor: Cursor = None, limit: Limit = 50) -> Page[FileView]:
    """One page."""
    before = check_cursor(cursor, ids.FILE)
    rows = context.store.call(read.list_files, before=before, limit=limit + 1)
    page, following = cut_page(rows, limit)
    return Page(items=[file_view(file) for file in page], next=following)


@router.get("/files/{file_id}", summary="Look at a file", responses=responses(404))
def get_file(file_id: FileId, context: ContextDep) -> FileView:
    """Size, name and SHA-256."""
    return file_view(context.store.call(find_file, file_id))


@router.get(
    "/files/{file_id}/content",
    response_class=FileResponse,
    summary="Download a file",
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The file."},
        **responses(404),
    },
)
def get_content(file_id: FileId, request: Request, context: ContextDep) -> Response:
    """`ETag` is the SHA-256; `Range` works."""
    file = context.store.call(find_file, file_id)
    return send_file(context, request, file.path, file.sha256, file.name)
