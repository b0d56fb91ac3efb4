"""Published models: names with versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query, Response
from fastapi import Path as UrlPath

from scheduler.api.auth import CallerDep
from scheduler.api.context import ContextDep
from scheduler.api.errors import responses
from scheduler.api.lookup import Limit
from scheduler.api.views import model_view
from shared import ids
from shared.errors import NotFound
from shared.specs import MODEL_NAME
from shared.store import models
from shared.views import ModelView, Page

router = APIRouter(tags=["models"])

Name = Annotated[str, UrlPath(pattern=f"^{MODEL_NAME}$", description="For instance `topics`.")]
Version = Annotated[
    str,
    UrlPath(
        pattern="^[a-z0-9]{1,20}$",
        description="A number, `latest`, or a stage: `staging`, `production`, `archived`.",
    ),
]
Number = Annotated[int, UrlPath(ge=1, lt=2**31, description="The version's number.")]
Tags = Annotated[list[str], Body(description="Labels of your own.", max_length=models.MAX_TAGS)]


@router.post(
    "/models",
    status_code=201,
    summary="Publish the model of a training job",
    responses={200: {"model": ModelView, "description": "It is already."}, **responses(404, 409)},
)
def publish(
    response: Response,
    caller: CallerDep,
    context: ContextDep,
    job: Annotated[str, Body(examples=["job_01JD2V5N0W8R4QK7T9Y3ZB6XEM"])],
    name: Annotated[str, Body(pattern=f"^{MODEL_NAME}$", examples=["topics"])],
    tags: Tags = [],  # noqa: B006 - FastAPI copies it
) -> ModelView:
    """As the next version of `name`. Specs can then say `model: name@version`."""
    if not ids.is_id(job, ids.JOB):
        raise NotFound("there is no such job", param="job", hint="`gpuyard jobs` lists them.")
    model, new = context.store.call(
        models.publish_model, job, name, tags=tags, created_by=caller.key_id or ""
    )
    response.status_code = 201 if new else 200
    return model_view(model)


@router.get("/models", summary="List models by name, each in its newest version")
def list_models(
    context: ContextDep,
    cursor: Annotated[
        str | None, Query(pattern=f"^{MODEL_NAME}$", description="`next` of the page before.")
    ] = None,
    limit: Limit = 50,
) -> Page[ModelView]:
    """One page."""
    rows = context.store.call(models.list_models, after=cursor, limit=limit + 1)
    page = [model_view(row) for row in rows[:limit]]
    return Page(items=page, next=page[-1].name if len(rows) > limit else None)


@router.get(
    "/models/{name}", summary="The versions of a model, newest first", responses=responses(404)
)
def list_versions(name: Name, context: ContextDep) -> Page[ModelView]:
    """All of them."""
    rows = context.store.call(models.list_versions, name)
    if not rows:
        raise NotFound(f"there is no model '{name}'", hint="`gpuyard models` lists them.")
    return Page(items=[model_view(row) for row in rows])


@router.get("/models/{name}/{version}", summary="Look at a version", responses=responses(404))
def get_model(name: Name, version: Version, context: ContextDep) -> ModelView:
    """Its files are the artifacts `model/…` of its job."""
    model = context.store.call(models.find_model, name, version)
    if model is None:
        raise NotFound(f"there is no model '{name}@{version}'", hint="`gpuyard models` lists them.")
    return model_view(model)


@router.patch(
    "/models/{name}/{version}", summary="Move to a stage, or tag", responses=responses(404)
)
def change_model(
    name: Name,
    version: Number,
    context: ContextDep,
    stage: Annotated[
        str | None, Body(description="`staging`, `production`, `archived`, or empty for none.")
    ] = None,
    tags: Annotated[list[str] | None, Body(max_length=models.MAX_TAGS)] = None,
) -> ModelView:
    """One version of a name is in production: moving another there archives it."""
    changed = context.store.call(models.change_model, name, version, stage=stage, tags=tags)
    return model_view(changed)


@router.delete(
    "/models/{name}/{version}", summary="Take off the list", responses=responses(404, 409)
)
def delete_model(name: Name, version: Number, context: ContextDep) -> ModelView:
    """The files stay with the job. The number is not given again. Not while it is in production."""
    return model_view(context.store.call(models.delete_model, name, version))
