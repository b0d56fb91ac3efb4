"""The application: routes, middleware, and the life of what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from scheduler.api import (
    artifacts,
    examples,
    files,
    fleet,
    health,
    jobs,
    models,
    results,
    retries,
    sweeps,
    usage,
)
from scheduler.api.auth import require_key
from scheduler.api.context import Context
from scheduler.api.documentation import ASSETS, install_documentation
from scheduler.api.errors import install_error_handlers, responses
from scheduler.api.keys import KeyCache
from scheduler.api.parameters import refuse_unknown
from scheduler.api.requests import RequestContext
from scheduler.api.uploads import sweep_abandoned
from scheduler.api.wakeups import Wakeups
from shared.settings import Settings
from shared.store import Store

_DESCRIPTION = """
Submit training and batch-inference jobs, follow them, and fetch what they made.

Every request under `/v1` carries an API key: `Authorization: Bearer gy_…`. To try requests out on this
page, press **Authorize** and paste the key; this browser keeps it.

Every error is `{"error": {"code", "message", "param", "hint", "request_id"}}`; `code` is stable.

Lists are pages, newest first: pass `next` as `cursor`. Query parameters that a route does not have are refused.
"""
_TAGS = [
    {"name": "jobs", "description": "Submit, list, look at, follow and cancel."},
    {"name": "sweeps", "description": "Many trials of one training, and the best of them."},
    {"name": "results", "description": "Rows of batch jobs, also while they run."},
    {"name": "artifacts", "description": "Checkpoints and deliverables."},
    {"name": "models", "description": "Names and versions of what training jobs made."},
    {"name": "files", "description": "Uploads that specs can name."},
    {"name": "usage", "description": "Device time, rows and tokens, by API key, project or day."},
    {"name": "fleet", "description": "Devices and workers."},
    {"name": "health", "description": "For monitors; needs no key."},
]


def create_app(settings: Settings, store: Store) -> FastAPI:
    """The API over ``store``. Neither Postgres nor the broker needs to be up: requests are answered
    with 503 until Postgres is."""
    context = Context(settings, store, KeyCache(store), Wakeups(store))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.wakeups.start()
        await run_in_threadpool(sweep_abandoned, settings)
        try:
            yield
        finally:
            context.wakeups.close()

    # The pages that come with it load scripts from a CDN: ours replaces them.
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        static_url=ASSETS,
        title="gpuyard",
        version=health.service_version(),
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.context = context
    v1 = APIRouter(
        prefix="/v1",
        dependencies=[Depends(require_key), Depends(refuse_unknown)],
        responses=responses(401, 422, 503),
    )
    for part in (jobs, retries, sweeps, results, artifacts, models, files, usage, fleet):
        v1.include_router(part.router)
    app.include_router(v1)
    # Without `refuse_unknown`: monitors append what they like against caches, and nothing is asked.
    app.include_router(health.router)
    install_documentation(app)
    app.add_middleware(RequestContext)
    install_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the schemas of the specs, whose bodies the routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            tags=app.openapi_tags,
            routes=app.routes,
        )
        document["components"]["schemas"] |= examples.spec_schemas()
        app.openapi_schema = document
    return app.openapi_schema
