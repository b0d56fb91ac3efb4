"""Is the process alive, and can it serve?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from scheduler.api.context import Context, ContextDep
from shared.migrate import missing_migrations
from shared.views import Health

router = APIRouter(tags=["health"])
_BROKER_TIMEOUT = 2.0


def service_version() -> str:
    try:
        return version("gpuyard")
    except PackageNotFoundError:
        return "0+unknown"


@router.get("/healthz", summary="Is the process alive?")
def healthz() -> Health:
    """Asks nothing of anyone: for the supervisor that would restart this process."""
    return Health(status="ok", version=service_version())


@router.get(
    "/readyz",
    summary="Can it serve?",
    responses={503: {"model": Health, "description": "Postgres is down or lacks migrations."}},
)
def readyz(context: ContextDep, response: Response) -> Health:
    """`ready`; `degraded` while the broker is down, in which jobs are still accepted and wait; or
    `unavailable`."""
    checks = {"postgres": _postgres(context), "broker": _broker(context.settings.broker_url)}
    status = "ready"
    if checks["postgres"] != "ok":
        status, response.status_code = "unavailable", 503
    elif checks["broker"] != "ok":
        status = "degraded"
    return Health(status=status, checks=checks, version=service_version())


def _postgres(context: Context) -> str:
    try:
        missing = missing_migrations(context.store.engine)
    except SQLAlchemyError:
        return "cannot be reached"
    return f"lacks migration {missing}" if missing else "ok"


def _broker(url: str) -> str:
    plain = url.replace("redis+socket://", "unix://", 1)
    try:
        client = Redis.from_url(
            plain, socket_timeout=_BROKER_TIMEOUT, socket_connect_timeout=_BROKER_TIMEOUT
        )
        with client:
            client.ping()
    except (RedisError, OSError, ValueError):
        return "cannot be reached"
    return "ok"
