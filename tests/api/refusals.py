"""What a refused submission answers, for the tests of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.api.conftest import error_of

Spec = Callable[..., dict[str, Any]]


def refused(
    client: httpx.Client, spec: Any, code: str, *, param: str | None = None, status: int = 422
) -> dict[str, Any]:
    error = error_of(client.post("/v1/jobs", content=json.dumps(spec)), status, code)
    assert error["param"] == param, error
    assert client.get("/v1/jobs").json()["items"] == [], "something was stored"
    return error
