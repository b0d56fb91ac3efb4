"""API keys: ``Authorization: Bearer gy_…``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from scheduler.api.context import Context, get_context
from shared.errors import AuthenticationFailed


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. ``key_id`` is None where authentication is off."""

    key_id: str | None


_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="api_key",
    description="A key made by `python -m scheduler keys create --name NAME`; that of `gpuyard up` is "
    "in `secrets/api-key` of its data folder.",
)


def require_key(
    request: Request,
    context: Annotated[Context, Depends(get_context)],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """The caller of the request.

    Raises:
        AuthenticationFailed: no key, or one that is unknown or revoked.
    """
    if not context.settings.auth:
        return Caller(None)
    if credentials is None:
        given = "authorization" in request.headers
        raise AuthenticationFailed(
            "the Authorization header is not `Bearer <key>`" if given else "an API key is needed",
            hint="Send `Authorization: Bearer gy_…`, or set GPUYARD_API_KEY for the CLI and SDK.",
        )
    key_id = context.keys.key_id(credentials.credentials)
    if key_id is None:
        raise AuthenticationFailed(
            "the API key is unknown or revoked",
            hint="Make one with `python -m scheduler keys create --name NAME`; that of `gpuyard up` "
            "is in the file it names at its start.",
        )
    return Caller(key_id)


CallerDep = Annotated[Caller, Depends(require_key)]
