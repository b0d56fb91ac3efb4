"""Query parameters that a route does not have are refused, on every route alike."""

from __future__ import annotations

import httpx
import pytest

from scheduler.api.app import create_app
from tests.api.conftest import Api, error_of


def test_a_misspelt_filter_is_named_with_what_is_meant(client: httpx.Client) -> None:
    error = error_of(client.get("/v1/jobs?stat=failed&limit=3"), 422, "invalid_request")
    assert error["param"] == "stat"
    assert error["message"] == "GET /v1/jobs has no query parameter 'stat'"
    assert error["hint"].startswith("Did you mean 'state'? It has cursor, ")
    assert "limit" in error["hint"]
    assert client.get("/v1/jobs?state=failed&limit=3").status_code == 200


def test_a_parameter_of_another_route_is_unknown(client: httpx.Client) -> None:
    error = error_of(client.get("/v1/devices?limit=3"), 422, "invalid_request")
    assert (error["param"], error["hint"]) == ("limit", "It has none.")


def test_nothing_is_submitted_or_uploaded_with_one(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/files?nam=x", content=b"abc"), 422, "invalid_request")
    assert error["hint"] == "Did you mean 'name'? It has name."
    assert client.get("/v1/files").json()["items"] == []
    error_of(client.post("/v1/jobs?dry=1", content=b"{"), 422, "invalid_request")


def test_the_key_is_asked_for_first(api: Api) -> None:
    with httpx.Client(base_url=api.url) as client:
        error_of(client.get("/v1/jobs?stat=failed"), 401, "authentication_failed")


def test_monitors_may_append_what_they_like(client: httpx.Client) -> None:
    assert client.get("/healthz?now=1").status_code == 200


def test_every_route_knows_what_the_documentation_says_it_has(
    api: Api, client: httpx.Client, subtests: pytest.Subtests
) -> None:
    paths = create_app(api.settings, api.store).openapi()["paths"]
    asked = 0
    for path, methods in paths.items():
        if not path.startswith("/v1"):
            continue
        for method, route in methods.items():
            given = route.get("parameters", [])
            documented = sorted(p["name"] for p in given if p["in"] == "query")
            with subtests.test(f"{method} {path}"):
                answer = client.request(method, path, params={"zzz": "1"})
                error = error_of(answer, 422, "invalid_request")
                assert error["param"] == "zzz"
                assert error["hint"] == f"It has {', '.join(documented) or 'none'}."
                asked += 1
    assert asked > 20
